"""What this machine has, and how fast it really multiplies matrices.

    >>> machine = facts()
    >>> machine.cpus, machine.accelerators, machine.hardware
    (2, (), 'cpu')

`facts` is what a plan is made from. It imports torch only where an accelerator may be present, so that a plan on a
laptop or a login node answers at once. `measured_peak` gives MFU a denominator where the catalogue has none.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import ShoestringError
from ...cgroups import usable_cpus, usable_memory
from ...cluster.config.hardware import HardwareError, hardware, match
from ...directories import home
from ...files import replace_file

PACKAGES = ("torch", "pytorch-lightning", "deepspeed", "transformers", "peft")
BUDGET_SECONDS = 0.25  # of one peak measurement
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, WSL


class MachineError(ShoestringError):
    """A question about this machine that has no answer."""


@dataclass(frozen=True)
class Accelerator:
    """One visible GPU: its driver name, the memory a program sees, its catalogue entry (None: not in the catalogue)."""

    name: str
    memory_bytes: int
    hardware: str | None


@dataclass(frozen=True)
class Machine:
    """This node as the process sees it.

    cpus            cores this process may use (affinity and cgroup quota), not those the machine has
    memory_bytes    host memory, or the cgroup's limit where that is lower
    accelerators    visible GPUs in device order
    bf16, fp16      whether the device computes in that type in hardware (the CPU where there is no GPU)
    hardware        catalogue name of the device, "cpu" without a GPU, None for a GPU the catalogue does not know
    versions        of python and the packages a run depends on; None: not installed
    """

    host: str
    cpus: int
    memory_bytes: int
    accelerators: tuple[Accelerator, ...]
    bf16: bool
    fp16: bool
    hardware: str | None
    versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def accelerator(self) -> str:
        """ "cuda" (NVIDIA or AMD) or "cpu"."""
        return "cuda" if self.accelerators else "cpu"


def facts() -> Machine:
    """Look at this machine. A few milliseconds without a GPU; imports torch and asks the driver with one."""
    accelerators = _accelerators()
    bf16, fp16 = _gpu_types() if accelerators else _cpu_types()
    return Machine(
        host=platform.node(),
        cpus=usable_cpus(),
        memory_bytes=usable_memory(),
        accelerators=accelerators,
        bf16=bf16,
        fp16=fp16,
        hardware=accelerators[0].hardware if accelerators else "cpu",
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    )


def version(package: str) -> str | None:
    """Installed version of a distribution without importing it; None if absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak(dtype: str, name: str | None = None) -> tuple[float, str]:
    """(dense peak FLOP/s of one device, "catalogue" | "measured") for `dtype` on catalogue device `name`."""
    if name is not None:
        known = hardware(name).peak_flops.get(dtype)
        if known is not None:
            return known, "catalogue"
    return measured_peak(dtype), "measured"


_measured: dict[tuple[Path, str], float] = {}  # by this process


def measured_peak(dtype: str) -> float:
    """Matrix-multiply FLOP/s this process reaches on its device with the threads it has (`torch.get_num_threads()`).

    The best of repeated square products, 0.3 s once a process; the best ever is kept in `$SHOESTRING_HOME/peaks.json`,
    under device, host, threads and dtype. Ranks that measure together share the memory bandwidth, as in training.
    """
    if dtype not in _DTYPES:
        raise MachineError(f"cannot measure dtype {dtype!r}. Known: {', '.join(_DTYPES)}.")
    store, key = home() / "peaks.json", _peak_key(dtype)
    best = read_peaks(store).get(key, 0.0)
    if (store, key) not in _measured:
        _measured[store, key] = _measure_threads(dtype)
        if _measured[store, key] > best:  # a busy machine measures too little, never too much
            write_peaks(store, {key: _measured[store, key]})
    return max(best, _measured[store, key])


def _peak_key(dtype: str) -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_model()}|{torch.get_num_threads()}t"
    return f"{device}|{platform.node()}|torch{torch.__version__}|{dtype}"


def read_peaks(store: Path) -> dict[str, float]:
    try:
        return dict(json.loads(store.read_text()))
    except (OSError, ValueError):  # absent, or cut short by a full disk: measuring again is cheap
        return {}


def write_peaks(store: Path, peaks: dict[str, float]) -> None:
    with contextlib.suppress(OSError):  # a read-only home costs 0.3 s a run, no more
        replace_file(store, json.dumps({**read_peaks(store), **peaks}, indent=1, sort_keys=True))


def _measure_threads(dtype: str) -> float:
    """One thread's figure times the threads: together they would wait for each other on a busy machine."""
    import torch

    if torch.cuda.is_available():
        return _measure(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * _measure(dtype)
    finally:
        torch.set_num_threads(threads)


def _measure(dtype: str) -> float:
    """Grow the matrices until one product takes long enough to time, then keep the fastest until the time is up."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest = 8192 if device == "cuda" else 1024
    start, best, side = time.perf_counter(), 0.0, 128
    with torch.inference_mode():
        operands = _operands(torch, dtype, device, side)
        while not best or time.perf_counter() - start < BUDGET_SECONDS:  # once, however busy the machine is
            seconds = _product_seconds(torch, operands, device)
            best = max(best, 2 * side**3 / seconds)
            if seconds < 0.01 and side < largest:
                side *= 2
                operands = _operands(torch, dtype, device, side)
                _product_seconds(torch, operands, device)  # the first product of a size pays for set-up
    return best


def _operands(torch: Any, dtype: str, device: str, side: int) -> Any:
    own = torch.Generator(device).manual_seed(0)  # the run's own random state stays untouched
    random = torch.randn(2, side, side, device=device, generator=own)  # constant data would let a GPU clock higher
    return random.to(getattr(torch, _DTYPES[dtype])).unbind()


def _product_seconds(torch: Any, operands: Any, device: str) -> float:
    started = time.perf_counter()
    operands[0] @ operands[1]
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _accelerators() -> tuple[Accelerator, ...]:
    if "torch" not in sys.modules and not any(os.path.exists(node) for node in _NODES):
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(_accelerator(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count()))


def _accelerator(properties: Any) -> Accelerator:
    entry = None
    with contextlib.suppress(HardwareError):  # a damaged user file: the plan and the doctor report it, facts stay facts
        entry = match(properties.name)
    return Accelerator(properties.name, properties.total_memory, entry.name if entry else None)


def _gpu_types() -> tuple[bool, bool]:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False), True


def _cpu_types() -> tuple[bool, bool]:
    flags = cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}), bool(flags & {"avx512_fp16", "amx_fp16", "fphp"})


def multiplies_bytes() -> bool:
    """Whether this CPU sums products of unsigned and signed bytes in 32 bits; False where that cannot be told."""
    return "86" not in platform.machine().lower() or bool(cpu_flags() & {"avx512_vnni", "avx_vnni"})


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the first core, as Linux names them; empty where /proc/cpuinfo does not exist."""
    return frozenset(_cpuinfo("flags", "Features").split())


def cpu_model() -> str:
    """Model name of the first core."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.strip()
    return ""


def run_facts(
    strategy: Any, accelerator: str, offload: str = "none", optimizer: str | None = None, *,
    bf16: bool | None = None, fp16: bool | None = None, in_backward: bool = False, adapted: bool = False,
    quantized: bool = False, nvme: bool = False,
) -> frozenset[str]:  # fmt: skip
    """What techniques may need or refuse: "cuda" or "cpu", "bf16", "fp16", "single", "ddp", "zero-1", …, "fsdp2".

    offload: what is kept in host memory: "offload".
    bf16, fp16: whether the device computes in that type; None: as this machine's.
    in_backward: parameters step in backward: "step-in-backward".
    adapted: the weights are frozen, and adapters beside them are trained: "model.adapter".
    quantized: the base's weights are kept as codes: "model.dtype nf4 or int8".
    nvme: optimizer state lies on a drive: "nvme".
    """
    if bf16 is None or fp16 is None:
        bf16, fp16 = (machine := facts()).bf16, machine.fp16
    names = {accelerator}
    if bf16 or accelerator == "cpu":  # CPUs without bf16 instructions emulate it
        names.add("bf16")
    if fp16 and accelerator == "cuda":
        names.add("fp16")
    if isinstance(strategy, str):
        names.add(f"zero-{strategy[-1]}" if strategy.startswith("zero") else strategy)
    if offload != "none":
        names.add("offload")
    if in_backward:
        names.add("step-in-backward")
    if optimizer:
        names.add(optimizer)
    if adapted:
        names.add("model.adapter")
    if quantized:
        names.add("model.dtype nf4 or int8")
    if nvme:
        names.add("nvme")
    return frozenset(names)


def is_first() -> bool:
    """Whether this process is rank 0, also before any process group exists."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0
