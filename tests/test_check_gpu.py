"""The check of a GPU, on a CPU: what it says after each step, and that no step can end or hold up the others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "check_gpu"
TEN = (
    "machine",
    "sharded-state",
    "offload",
    "resume",
    "train-",
    "lora-",
    "attention",
    "checkpoint",
    "energy",
    "contracts-",
)
# steps in place of the real ones: one that hangs with a child of its own, and some that fail
HANGS = """
import subprocess, sys, time
from checks import main
def hangs(found):
    found.figure(child=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    time.sleep(600)
main({"hangs": hangs})
"""
CRASHES = """
from checks import main
def crashes(found):
    found.holds("what came before", True)
    raise ValueError("the third layer is missing")
def breaks(found):
    found.holds("this", True)
    found.holds("that", False)
def says_nothing(found):
    pass
main({"crashes": crashes, "breaks": breaks, "says-nothing": says_nothing})
"""


@pytest.fixture(scope="module")
def check():
    """`benchmarks/check_gpu/__main__.py`, imported as it is when it runs."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("check_gpu", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_gpu"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def result_lines(out: str) -> dict[str, dict]:
    return {(row := json.loads(line))["step"]: row for line in out.splitlines() if line.startswith("{")}


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_no_step_ends_or_holds_up_the_others(check, tmp_path, capsys):
    for name, text in (("hangs", HANGS), ("crashes", CRASHES)):
        (tmp_path / f"{name}.py").write_text(f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n{text}")
    steps = [
        check.Step("hangs", tmp_path / "hangs.py", 3, "never ends"),
        check.Step("crashes", tmp_path / "crashes.py", 100, "raises"),
        check.Step("breaks", tmp_path / "crashes.py", 100, "a check does not hold"),
        check.Step("says-nothing", tmp_path / "crashes.py", 100, "checks nothing"),
        check.Step("attention", FOLDER / "attention.py", 300, "a real one, half of which needs a GPU"),
        check.Step("energy", FOLDER / "energy.py", 300, "a real one, which needs a GPU"),
    ]
    code = check.main(
        ["--device", "cpu", "--out", str(tmp_path / "out.json"), "--patience", "1", "--seconds", "1500"], steps
    )
    printed = capsys.readouterr()
    rows = result_lines(printed.out)
    assert code == 1 and list(rows) == [step.name for step in steps]
    assert rows["hangs"]["error"] == "ended at its limit of 3 s" and rows["hangs"]["seconds"] < 60
    assert gone(rows["hangs"]["figures"]["child"]), "what it had started is ended with it"
    assert rows["crashes"]["error"] == "ValueError: the third layer is missing"
    assert rows["crashes"]["checks"] == {"what came before": True} and "Traceback" in printed.err
    assert rows["breaks"]["error"] == "does not hold: that"
    assert rows["says-nothing"]["error"] == "nothing was checked"
    assert [row["ok"] for row in rows.values()] == [False, False, False, False, None, None]
    assert rows["attention"]["checks"] == {
        "flex keeps documents apart as the mask does": "needs CUDA",
        "varlen keeps documents apart as the mask does": "needs CUDA",
        "a masked document is computed as if it were alone": True,
    }
    assert rows["attention"]["figures"]["masked_ms"] > 0
    assert rows["energy"]["checks"] == {"kWh within 5 % of the driver's power": "needs CUDA"}
    table = printed.out.partition("step  ")[2] or printed.out
    assert "FAILED: ValueError: the third layer is missing" in table
    assert "NOT SHOWN: kWh within 5 % of the driver's power (needs CUDA)" in table
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["steps"] == list(rows.values()) and kept["device"] == "cpu" and kept["versions"]["torch"]
    assert kept["date"] and kept["hardware"]


def test_what_no_time_is_left_for_fails(check, tmp_path, capsys):
    steps = [check.Step("energy", FOLDER / "energy.py", 30, "")]
    assert check.main(["--device", "cpu", "--out", str(tmp_path / "out.json"), "--seconds", "0.000001"], steps) == 1
    assert result_lines(capsys.readouterr().out)["energy"]["error"] == "not begun: no time was left"


def test_every_step_of_the_ten_has_a_script_that_knows_it(check):
    for beginning in TEN:
        assert any(step.name.startswith(beginning) for step in check.STEPS), beginning
    for step in check.STEPS:
        assert step.script.is_file() and step.name.startswith(TEN)


def test_results_of_a_gpu_lie_among_the_results_and_those_of_a_cpu_do_not(check):
    assert check.default_place("cuda", {"hardware": "h100"}) == FOLDER.parent / "results" / "gpu-h100.json"
    assert check.default_place("cpu", {"hardware": "cpu"}).parent.name == "build"


def test_only_wheels_of_packages_that_are_missing_are_unpacked(check, tmp_path):
    import wheels

    for name in ("torch", "not_on_this_machine"):
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "HERE = True\n")
            wheel.writestr(f"{info}/METADATA", about)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    target = wheels.install(tmp_path, tmp_path / "added")
    assert {path.name for path in target.iterdir()} == {"not_on_this_machine", "not_on_this_machine-1.0.dist-info"}
    env = {**os.environ, "PYTHONPATH": str(target)}
    subprocess.run([sys.executable, "-c", "import not_on_this_machine as m; assert m.HERE"], env=env, check=True)
    (tmp_path / "not_on_this_machine-1.0-py3-none-any.whl").unlink()
    assert wheels.install(tmp_path, tmp_path / "other") is None
