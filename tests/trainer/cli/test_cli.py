"""The command line as a user meets it: real processes, their exit codes, their words, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoestring.trainer.cli.app import main

pytestmark = pytest.mark.filterwarnings("ignore")

# recipe text -> words that its one error must contain
MALFORMED = {
    "unknown key": ("optimizer: {lrr: 1}", ["optimizer.lrr", "lr"]),
    "unknown technique": ("techniques: [gradual_prunning]", ["gradual_prunning", "did you mean 'gradual_pruning'"]),
    "unknown setting": ("techniques: [{gradual_pruning: {sparsty: 0.5}}]", ["sparsty", "sparsity"]),
    "illegal setting": ("techniques: [{gradual_pruning: {sparsity: 1.5}}]", ["1.5", "[0, 1)"]),
    "wrong type": ("seed: three", ["seed", "three"]),
    "conflict": ("precision: fp16", ["fp16"]),
    "impossible budget": ("budget: {samples: 1}", ["budget.samples", "at least one optimizer step"]),
    "bad unit": ("budget: {hours: 2 fortnights}", ["fortnights"]),
    "python tag": ("seed: !!python/object/apply:os.system ['touch OWNED']", ["tag"]),
}
BASE = """
model: {task: image-classification, config: {kind: mlp, hidden: [16]}}
data: {source: digits, batch_size: 64}
"""


def shoestring(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "SHOESTRING_HOME": str(cwd / "home"), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-m", "shoestring.trainer.cli", *words],
        cwd=cwd, env=settings, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_help_answers_at_once_and_without_torch(tmp_path: Path) -> None:
    check = "import sys; sys.argv = ['shoestring', '--help']\nfrom shoestring.trainer.cli import main\ntry: main()\n"
    check += "except SystemExit: pass\nassert 'torch' not in sys.modules and 'pytorch_lightning' not in sys.modules"
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
        spent.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout
    print(f"shoestring --help: {min(spent):.2f} s")
    # the figure belongs to the benchmark; this bound only catches a heavy import
    assert min(spent) < 2.0


@pytest.mark.parametrize("case", MALFORMED)
def test_bad_input_is_one_error_exit_2_and_nothing_left(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section, words = MALFORMED[case]
    budget = "" if section.startswith("budget") else "budget: {steps: 10}\n"
    (tmp_path / "bad.yaml").write_text(BASE + budget + section + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["shoestring", "train", "bad.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("error:") == 1
    assert all(word in said for word in words), said
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_recipe_runs_is_accounted_and_resumes(tmp_path: Path) -> None:
    done = shoestring("train", "digits", "budget.steps=40", "--json", "report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 40
    assert report["stopped_by"] == "steps"
    assert report["usd"] > 0 and report["kwh"] > 0 and report["kwh_source"] in ("estimated", "rapl")
    assert report["flops_realised"] >= report["flops_counted"] > 0
    assert 0 < report["metrics"]["val_accuracy"] <= 1
    for word in ("val_accuracy", "energy", "cost", "budget used", "throughput", "peak memory"):
        assert word in done.stdout
    listed = json.loads(shoestring("runs", "list", "--json", cwd=tmp_path).stdout)
    assert [run["name"] for run in listed] == ["digits"]
    assert listed[0]["status"] == "finished"
    shown = json.loads(shoestring("runs", "show", "digits", "--json", cwd=tmp_path).stdout)
    assert {c["technique"] for c in shown["claims"]} == {"gradual_pruning", "lr_schedule"}
    assert shown["verdicts"] and shown["estimates"] and shown["measurements"]
    again = shoestring("train", "digits", "budget.steps=40", cwd=tmp_path)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert len(list((tmp_path / "runs" / "digits" / "events").glob("*.jsonl"))) == 1


def test_plan_starts_nothing(tmp_path: Path) -> None:
    done = shoestring("plan", "quickstart", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["predictions"]["parameters"] > 1e5
    assert {"hardware", "devices", "strategy", "batch", "price"} <= {c["what"] for c in plan["choices"]}
    assert not (tmp_path / "runs").exists()


def test_doctor_names_what_is_there(tmp_path: Path) -> None:
    done = shoestring("doctor", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode in (0, 1)
    assert "torch" in json.dumps(report)


def test_recipes_validate_and_show(tmp_path: Path) -> None:
    assert shoestring("recipes", "validate", "quickstart", cwd=tmp_path).returncode == 0
    shown = shoestring("recipes", "show", "digits", "seed=7", cwd=tmp_path).stdout
    (tmp_path / "own.yaml").write_text(shown)
    assert "7" in shoestring("recipes", "show", "own.yaml", cwd=tmp_path).stdout


def test_a_shell_completes_recipes_and_runs(tmp_path: Path) -> None:
    (tmp_path / "qualified.yaml").touch()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").touch()
    for words, names in (("train qu", ["qualified.yaml", "quickstart"]), ("chat runs/m", ["runs/mine"])):
        asks = {"_SHOESTRING_COMPLETE": "complete_bash", "COMP_WORDS": f"shoestring {words}", "COMP_CWORD": "2"}
        program = [str(Path(sys.executable).with_name("shoestring"))]
        done = subprocess.run(program, cwd=tmp_path, env={**os.environ, **asks}, capture_output=True, text=True)
        assert sorted(done.stdout.split()) == names, done.stderr
