"""Energy: RAPL counters from a directory of real files, the estimate against its formula, NVML where there is a GPU."""

import ctypes
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


def test_a_reading_is_cheap(powercap):
    meter = EnergyMeter(4.0, 1, local_rank=0, powercap=powercap)
    busy = time.process_time()
    for _ in range(100):
        meter.read()
    assert (time.process_time() - busy) / 100 < 2e-3


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
