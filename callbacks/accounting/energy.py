"""What a run draws, in joules, and how that is known.

Three sources, tried in this order; a reading comes from exactly one of them, for the whole time since the meter began:

    "nvml"       the driver's energy counter of this process's GPUs (Volta and later), else its power, integrated
    "rapl"       the CPU packages' energy counters of this node (`/sys/class/powercap`), without memory and the rest
    "estimated"  GPU:  watts_per_device x devices x wall seconds
                 CPU:  watts_per_device x (busy + 0.3 x idle),  busy = CPU seconds of this process,
                       idle = max(0, devices x wall seconds - busy)

Give each process its own meter for its own devices and add the readings up: that is the energy of the job. RAPL counts
a whole node, its other tenants too, so local rank 0 alone reports it and the others report 0. Not in any figure:
cooling, power supplies, switches; with "nvml" the host; with "estimated" the loader's worker processes beyond the idle
share.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
IDLE_SHARE = 0.3  # of a core's active watts, drawn while it waits for us; an estimate
DEFAULT_WATTS = {"cpu": 4.0, "cuda": 400.0}  # where neither a counter nor watts_per_device exist; estimates


class Source(Protocol):
    """Joules since the source began. OSError: it cannot be read any more."""

    def joules(self) -> float: ...


class EnergyMeter:
    """Cumulative energy of this process's devices.

    watts_per_device  what one device draws under load, for the estimate; None: DEFAULT_WATTS
    devices           how many devices this process answers for: GPUs, or cores
    accelerator       "cuda", "cpu" or "auto" (CUDA if this process has used it by the first reading)
    local_rank        place of this process on its node; default $LOCAL_RANK, $SLURM_LOCALID, 0
    powercap          the sysfs directory of the RAPL counters
    """

    def __init__(
        self,
        watts_per_device: float | None,
        devices: int,
        *,
        accelerator: str = "auto",
        local_rank: int | None = None,
        powercap: Path = POWERCAP,
    ) -> None:
        rank = _local_rank() if local_rank is None else local_rank
        self._accelerator = accelerator
        self._watts, self._devices = watts_per_device, devices
        self._clock, self._busy = time.monotonic(), time.process_time()
        # both counters start now; which of them counts is known only once the process has touched its device
        self._gpu = None if accelerator == "cpu" else Nvml.open(rank * devices, devices)
        self._cpu = None if accelerator == "cuda" else Rapl.open(powercap, reader=rank == 0)

    def read(self) -> tuple[float, str]:
        """(joules since the meter began, "nvml" | "rapl" | "estimated"). About 50 us; call it once a second at most.

        A counter that stops answering is dropped for good, and the estimate for the WHOLE time takes its place: one
        number never mixes the two.
        """
        if self._accelerator == "auto":
            self._accelerator = "cuda" if _cuda_in_use() else "cpu"
        if self._accelerator == "cuda" and self._gpu is not None:
            with contextlib.suppress(OSError):
                return self._gpu.joules(), "nvml"
            self._gpu = None
        if self._accelerator == "cpu" and self._cpu is not None:
            with contextlib.suppress(OSError):
                return self._cpu.joules(), "rapl"
            self._cpu = None
        return self._estimate(), "estimated"

    def _estimate(self) -> float:
        watts = DEFAULT_WATTS.get(self._accelerator, 0.0) if self._watts is None else self._watts
        wall = time.monotonic() - self._clock
        if self._accelerator == "cuda":
            return watts * self._devices * wall
        busy = time.process_time() - self._busy
        return watts * (busy + IDLE_SHARE * max(0.0, self._devices * wall - busy))


class SteadyEnergy:
    """An `EnergyMeter` asked now and then: in between, the average power so far is taken to hold.

    `began` and `now` are seconds of one clock. Readings grow rarer, up to one a second.
    """

    def __init__(self, meter: EnergyMeter, began: float) -> None:
        self._meter, self._began = meter, began
        self._read_at, self._joules, self.source = began, 0.0, "estimated"

    def at(self, now: float, *, exact: bool = False) -> float:
        """Joules from `began` to `now`; `exact` reads the meter whatever it costs."""
        elapsed = self._read_at - self._began
        if exact or now - self._read_at >= min(1.0, elapsed / 20):
            self._joules, self.source = self._meter.read()
            self._read_at, elapsed = now, now - self._began
        return self._joules * (1 + (now - self._read_at) / max(1e-9, elapsed))


class Rapl:
    """Energy of the CPU packages of this node, from the kernel's wrapping microjoule counters.

    Only `intel-rapl:*` zones named "package-*" count (AMD's appear under the same name): other zones are parts of
    them, "psys" contains them, and "intel-rapl-mmio:*" repeats them. One wrap between two readings is undone; a
    package at 250 W wraps every 17 minutes.
    """

    def __init__(self, zones: list[Path], reader: bool) -> None:
        self._reader = reader
        self._range = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        self._last = {zone: self._counter(zone) for zone in zones}
        self._microjoules = 0

    @classmethod
    def open(cls, powercap: Path, reader: bool) -> Rapl | None:
        """None where the kernel has no counters or hides them (root only since CVE-2020-8694; absent in most VMs)."""
        with contextlib.suppress(OSError, ValueError):
            zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _is_package(zone)]
            return cls(zones, reader) if zones else None
        return None

    def joules(self) -> float:
        for zone, before in self._last.items():
            now = self._counter(zone)
            self._microjoules += now - before if now >= before else now + self._range[zone] - before
            self._last[zone] = now
        return self._microjoules / 1e6 if self._reader else 0.0

    def _counter(self, zone: Path) -> int:
        return int((zone / "energy_uj").read_text())


def _is_package(zone: Path) -> bool:
    return (zone / "name").read_text().startswith("package")


class Nvml:
    """Energy of some GPUs as NVIDIA's driver knows it: millijoule counters, or milliwatts integrated over time.

    nvml     the module `pynvml`
    handles  the driver's, of the GPUs
    """

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._counts = self._has_counter()
        self._start = self._sum() if self._counts else 0
        self._power, self._time, self._joules = self._sum_power(), time.monotonic(), 0.0

    @classmethod
    def open(cls, first: int, count: int) -> Nvml | None:
        """The `count` visible GPUs from `first` on; None without a driver, a whole GPU or a readable sensor."""
        try:
            import pynvml
        except ImportError:
            return None
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            handles = [_handle(pynvml, spelled) for spelled in _mine(_visible(pynvml), first, count)]
            return cls(pynvml, handles) if handles else None
        return None

    def joules(self) -> float:
        try:
            return self._counted() if self._counts else self._integrated()
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None

    def _counted(self) -> float:
        return (self._sum() - self._start) / 1e3

    def _integrated(self) -> float:
        power, now = self._sum_power(), time.monotonic()
        self._joules += (power + self._power) / 2 * (now - self._time)
        self._power, self._time = power, now
        return self._joules

    def _has_counter(self) -> bool:
        """Whether the GPUs count energy: Volta and later do."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._sum()
            return True
        return False

    def _sum(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)

    def _sum_power(self) -> float:
        """Watts now, or 0 where the counter makes it needless."""
        if self._counts:
            return 0.0
        return sum(self._nvml.nvmlDeviceGetPowerUsage(handle) for handle in self._handles) / 1e3


def _visible(nvml: Any) -> list[str]:
    """Spellings of the GPUs this process may use, as CUDA_VISIBLE_DEVICES gives them: indices or UUIDs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [spelled.strip() for spelled in given.split(",") if spelled.strip()]
    return [str(index) for index in range(nvml.nvmlDeviceGetCount())]


def _mine(visible: list[str], first: int, count: int) -> list[str]:
    """A launcher that hides the other ranks' GPUs leaves fewer than `first`: then all that is visible is ours."""
    return visible[first : first + count] if len(visible) >= first + count else visible[:count]


def _handle(nvml: Any, spelled: str) -> Any:
    if spelled.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(spelled))
    # a MIG slice has a UUID too, but no energy of its own: the driver refuses, and we estimate
    return nvml.nvmlDeviceGetHandleByUUID(spelled)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def _cuda_in_use() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()
