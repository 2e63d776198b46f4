"""The catalogue of devices, and what this machine measures where the catalogue is silent."""

import datetime
import json
import subprocess
import sys

import pytest

from shoestring.cluster import HardwareError, known_hardware, match
from shoestring.cluster.config.hardware import hardware
from shoestring.trainer.machine.facts import MachineError, facts, measured_peak, peak

# what drivers really report, and the entry meant; None: a part, a slice or a sibling of a known device
DEVICE_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB300": "gb300",
    "NVIDIA A100-SXM4-80GB": "a100-80gb-sxm",
    "NVIDIA A100-SXM4-40GB": "a100-40gb-sxm",
    "A100-SXM-80GB": "a100-80gb-sxm",
    "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-40gb-pcie",
    "NVIDIA L40S": "l40s",
    "NVIDIA L40": "l40",
    "NVIDIA L4": "l4",
    "NVIDIA A10G": "a10g",
    "NVIDIA A10": "a10",
    "NVIDIA A40": "a40",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-16GB": "v100-16gb",
    "Tesla V100-SXM2-32GB": "v100-32gb",
    "Tesla V100-PCIE-16GB": "v100-pcie",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA RTX A6000": "rtx-a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000",
    "AMD Instinct MI300X": "mi300x",
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "GRID A100-10C": None,
    "Quadro RTX 6000": None,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": None,
    "NVIDIA H20": None,
    "": None,
}


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("reported", "name"), DEVICE_NAMES.items())
def test_a_device_name_matches_its_entry_and_no_other(reported, name):
    matched = match(reported)
    assert (matched.name if matched else None) == name


def test_peaks_are_dense_and_consistent():
    # published dense figures; other tables in use have H200, L40S and B200 wrong
    dense = {"h200": 989e12, "l40s": 362e12, "b200": 2250e12, "a100-80gb-sxm": 312e12, "l4": 121e12, "rtx-4090": 165e12}
    for name, flops in dense.items():
        assert hardware(name).peak_flops["bf16"] == pytest.approx(flops, rel=0.01)
    for entry in known_hardware().values():
        peaks = entry.peak_flops
        if "bf16" in peaks:  # tensor cores: each halving of the width doubles the rate; a sparse figure would stick out
            assert peaks["fp16"] == peaks["bf16"]
            assert peaks["tf32"] == pytest.approx(peaks["bf16"] / 2, rel=0.02), entry.name
            assert peaks["fp8"] == pytest.approx(peaks["bf16"] * 2, rel=0.02) if "fp8" in peaks else True, entry.name


def test_every_figure_is_plausible_dated_and_sourced():
    for entry in known_hardware().values():
        assert datetime.date.fromisoformat(entry.date) >= datetime.date(2026, 1, 1)
        assert "; price: " in entry.source
        assert (entry.usd_per_hour is None) == ("no public" in entry.source), entry.name
        assert entry.spot_usd_per_hour is None or entry.spot_usd_per_hour < entry.usd_per_hour
        if entry.name != "cpu":
            assert 50 < entry.watts <= 1400
            assert entry.memory_bytes > 14 * 2**30
            assert entry.peak_flops
    core = hardware("cpu")
    assert (dict(core.peak_flops), core.memory_bytes) == ({}, None)
    assert 0.01 < core.usd_per_hour < 0.1


def test_names_aliases_and_device_names_are_understood():
    assert hardware("H100").name == hardware("h100_sxm").name == hardware("NVIDIA H100 80GB HBM3").name == "h100-sxm"
    with pytest.raises(HardwareError, match=r"unknown hardware 'h100-sxn'\. Did you mean h100-sxm"):
        hardware("h100-sxn")


def test_the_users_file_is_merged_over_the_catalogue(own_home):
    shipped = hardware("h100-sxm")
    file = own_home / "hardware.yaml"
    file.write_text(
        "hardware:\n"
        "  h100-sxm: {usd_per_hour: 1.10, tflops: {bf16: 900}}\n"
        "  our-card: {memory_gib: 48, watts: 200, usd_per_hour: 0.2, match: ['acme x1'], tflops: {fp16: 50}}\n"
    )
    mine = hardware("h100-sxm")
    assert (mine.usd_per_hour, mine.peak_flops["bf16"]) == (1.10, 900e12)
    assert (mine.peak_flops["fp16"], mine.watts) == (shipped.peak_flops["fp16"], shipped.watts)
    assert str(file) in mine.source
    assert match("ACME X1").memory_bytes == 48 * 2**30
    file.unlink()
    assert hardware("h100-sxm") == shipped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hardware: {h200: {usd_per_hours: 1}}", "unknown key 'usd_per_hours'. Did you mean 'usd_per_hour'"),
        ("hardware: {h200: {usd_per_hour: cheap}}", r"h200\.usd_per_hour must be a number .* found 'cheap'"),
        ("hardware: {h200: {tflops: {bf61: 1}}}", "unknown dtype 'bf61'"),
        ("hardware: {x1: {watts: 1}}", "a new device needs memory_gib, usd_per_hour"),
        ("h200: {watts: 1}", "must have one top-level key"),
        ("hardware: [", "is not YAML"),
    ],
)
def test_a_wrong_user_file_is_refused_with_its_place(own_home, text, message):
    (own_home / "hardware.yaml").write_text(text)
    with pytest.raises(HardwareError, match=message) as error:
        hardware("h200")
    assert str(own_home / "hardware.yaml") in str(error.value)


def test_the_catalogue_and_facts_are_light():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from shoestring.cluster import hardware; hardware('h200')\n"
        "print(time.process_time() - start)\n"
        "from shoestring.trainer.machine.facts import facts\n"
        "print(bool(facts().accelerators) or 'torch' not in sys.modules)\n"
    )
    seconds, light = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert float(seconds) < 0.2
    assert light == "True"


def test_facts_are_those_of_this_machine():
    machine = facts()
    assert machine.cpus >= 1
    assert machine.memory_bytes > 2**28
    assert machine.accelerator == ("cuda" if machine.accelerators else "cpu")
    assert machine.hardware == "cpu" or machine.accelerators
    assert machine.versions["torch"]


def test_a_peak_is_measured_however_busy_the_machine_is(own_home, monkeypatch):
    monkeypatch.setattr(
        "shoestring.trainer.machine.facts.BUDGET_SECONDS", 0.0
    )  # all of it has gone by before it begins
    assert measured_peak("fp32") > 0


def test_a_measured_peak_is_real_cached_and_survives_a_damaged_cache(own_home):
    first = measured_peak("fp32")
    assert 1e9 < first < 1e15
    assert measured_peak("fp32") == first  # a second measurement would not agree to the last bit
    assert peak("fp32", "cpu") == (first, "measured")
    assert peak("bf16", "h200") == (989e12, "catalogue")
    store = own_home / "peaks.json"
    (key,) = json.loads(store.read_text())
    assert key.endswith("|fp32")
    store.write_text(store.read_text()[:10])
    assert 0.2 < measured_peak("fp32") / first < 5
    with pytest.raises(MachineError, match="cannot measure dtype 'int4'"):
        measured_peak("int4")
