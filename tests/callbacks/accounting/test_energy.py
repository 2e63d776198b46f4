"""Energy: RAPL counters from a directory of real files, the estimate against its formula, NVML of GPUs or of a fake."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from shoestring.callbacks.accounting.energy import IDLE_SHARE, EnergyMeter, Nvml

RANGE = 262_143_328_850  # microjoules, of a Xeon


@pytest.fixture
def powercap(tmp_path):
    """Two packages, and beside them the zones that would count the same energy twice."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:1": "package-1",
        "intel-rapl:0:0": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    for folder, name in zones.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(f"{name}\n")
        (tmp_path / folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
        set_counter(tmp_path, folder, 5_000_000)
    return tmp_path


def set_counter(powercap, folder, microjoules):
    (powercap / folder / "energy_uj").write_text(f"{microjoules}\n")


def test_rapl_adds_up_the_packages_and_nothing_else(powercap):
    meter = EnergyMeter(None, 1, accelerator="cpu", local_rank=0, powercap=powercap)
    assert meter.read() == (0.0, "rapl")
    set_counter(powercap, "intel-rapl:0", 8_000_000)
    set_counter(powercap, "intel-rapl:1", 6_500_000)
    for other in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        set_counter(powercap, other, 999_000_000)
    assert meter.read() == (4.5, "rapl")
    assert meter.read() == (4.5, "rapl")


def test_rapl_wraps_around(powercap):
    set_counter(powercap, "intel-rapl:0", RANGE - 1_000_000)
    meter = EnergyMeter(None, 1, accelerator="cpu", local_rank=0, powercap=powercap)
    for start in (2_000_000, 1_000_000):  # twice: forward past the end, then a whole turn but one joule
        set_counter(powercap, "intel-rapl:0", start)
        joules, source = meter.read()
    assert source == "rapl"
    assert joules == pytest.approx(3 + RANGE / 1e6 - 1)


def test_one_process_of_a_node_reports_the_packages(powercap):
    first, second = (EnergyMeter(None, 1, accelerator="cpu", local_rank=rank, powercap=powercap) for rank in (0, 1))
    set_counter(powercap, "intel-rapl:1", 7_000_000)
    assert first.read() == (2.0, "rapl")
    assert second.read() == (0.0, "rapl")


def test_a_counter_that_vanishes_is_replaced_by_the_estimate_for_the_whole_time(powercap):
    meter = EnergyMeter(10.0, 1, accelerator="cpu", local_rank=0, powercap=powercap)
    set_counter(powercap, "intel-rapl:0", 905_000_000)
    assert meter.read() == (900.0, "rapl")
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    joules, source = meter.read()
    assert source == "estimated"
    assert joules < 100  # none of the measured 900 J is in it


def test_counters_that_cannot_be_read_mean_an_estimate(powercap, tmp_path):
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    (powercap / "intel-rapl:0" / "energy_uj").mkdir()  # an OSError for root too, unlike missing permission
    for place in (powercap, tmp_path / "absent"):
        assert EnergyMeter(4.0, 1, accelerator="cpu", local_rank=0, powercap=place).read()[1] == "estimated"


def test_the_cpu_estimate_follows_its_formula(tmp_path):
    wall, busy = time.monotonic(), time.process_time()
    meter = EnergyMeter(100.0, 2, accelerator="cpu", local_rank=0, powercap=tmp_path)
    while time.process_time() - busy < 0.15:
        pass
    time.sleep(0.15)
    joules, source = meter.read()
    wall, busy = time.monotonic() - wall, time.process_time() - busy
    assert source == "estimated"
    assert joules == pytest.approx(100.0 * (busy + IDLE_SHARE * (2 * wall - busy)), rel=0.05)
    time.sleep(0.02)
    assert meter.read()[0] > joules


def test_one_sample_is_cheap(powercap):
    meter = EnergyMeter(4.0, 1, local_rank=0, powercap=powercap)
    busy = time.process_time()
    for _ in range(100):
        meter.read()
    assert (time.process_time() - busy) / 100 < 2e-3


STAND_IN = r"""
#include <stdlib.h>
#include <string.h>
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
static unsigned long long reads = 0;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(size_t)(index + 1);
    return index < 3 ? 0 : NOT_FOUND;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)(size_t)3;
    return strcmp(uuid, "GPU-third") ? NOT_FOUND : 0;
}
/* each reading of GPU n has 2^n J more than the one before; after the fourth the GPU falls off the bus */
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    if (getenv("NO_COUNTER")) return NOT_SUPPORTED;
    *millijoules = 1000ULL * (1ULL << (size_t)device) * ++reads;
    return reads > 4 ? 15 : 0;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 100000; return 0; }
const char *nvmlErrorString(int code) { return "an error"; }
"""
READ = """
import json, time
from shoestring.callbacks.accounting.energy import EnergyMeter
before = time.monotonic()
meter = EnergyMeter(7.0, 1, accelerator="cuda", local_rank=1)
after, told = time.monotonic(), []
for _ in range(3):
    time.sleep(0.05)
    told.append(meter.read())
seconds = time.monotonic() - after  # less than since the meter began, but for this last moment
print(json.dumps([told, 0.9 * seconds, time.monotonic() - before]))
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder with a driver's library of three GPUs, for a process of its own to find first."""
    if shutil.which("cc") is None:
        pytest.skip("no compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(STAND_IN)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(library), str(folder / "nvml.c")], check=True)
    return folder


def readings(folder, **variables):
    """What the process of local rank 1 reads, three times."""
    pytest.importorskip("pynvml")
    environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", READ], capture_output=True, text=True, check=True,
        env={**environ, "LD_LIBRARY_PATH": str(folder), **variables},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("visible", "joules"),
    [
        ({}, 4.0),  # the second of all
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, 2.0),  # the second of those named
        ({"CUDA_VISIBLE_DEVICES": "GPU-third"}, 8.0),  # the one that is left of what the launcher hides
    ],
    ids=str,
)
def test_nvml_counts_the_process_own_gpu_until_it_is_gone(stand_in, visible, joules):
    """A reading to see whether it counts, one to begin with, two that are told, and none of a lost GPU."""
    (first, second, (estimate, source)), least, most = readings(stand_in, **visible)
    assert first == [joules, "nvml"] and second == [2 * joules, "nvml"]
    assert source == "estimated" and 7 * least <= estimate <= 7 * most


def test_without_a_counter_power_is_integrated(stand_in):
    (*_, (joules, source)), least, most = readings(stand_in, NO_COUNTER="1")
    assert source == "nvml" and 100 * least <= joules <= 100 * most


@pytest.mark.parametrize("visible", ["", "7", "MIG-1234"])
def test_no_gpu_of_ones_own_is_estimated_quietly(stand_in, visible):
    samples, *_ = readings(stand_in, CUDA_VISIBLE_DEVICES=visible)
    assert {source for _, source in samples} == {"estimated"}


def driver() -> bool:
    try:
        return ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2() == 0
    except OSError:
        return False


@pytest.mark.skipif(not driver(), reason="no NVIDIA driver")
def test_nvml_counts_up_at_a_plausible_power():
    meter = EnergyMeter(None, 1, accelerator="cuda", local_rank=0)
    time.sleep(1.0)
    joules, source = meter.read()
    assert source == "nvml"
    assert 3 < joules < 2000
    power = Nvml.open(0, 1)
    power._counts = False  # the road of devices without a counter
    power._power = power._sum_power()
    time.sleep(0.5)
    assert 1 < power.joules() < 1000


@pytest.mark.skipif(driver(), reason="there is a GPU")
def test_without_a_driver_a_gpu_is_estimated_by_the_wall_clock():
    began = time.monotonic()
    meter = EnergyMeter(500.0, 2, accelerator="cuda", local_rank=0)
    time.sleep(0.1)
    joules, source = meter.read()
    assert source == "estimated"
    assert joules == pytest.approx(500 * 2 * (time.monotonic() - began), rel=0.05)
