"""Measuring real small models: figures worked out by hand, formulas, and the ledger's rows."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command
from finished import finished
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoestring.trainer.export import footprint, low_rank, metrics, quality, speed
from shoestring.trainer.export.measure_target import open_target
from shoestring.trainer.export.measurement import MeasureOptions, measure
from shoestring.trainer.export.pareto import front
from shoestring.trainer.export.trained import CannotExport, open_run
from shoestring.trainer.export.write import export
from shoestring.trainer.ledger import Ledger, read

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = MeasureOptions(memory=False, rounds=1)


# -- formulas --------------------------------------------------------------------------------------------------------
figures = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(figures, figures)))
def test_a_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    front = metrics.pareto_front(points)
    assert sorted(front) == [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_a_front_by_hand() -> None:
    points = [(10, 0.9), (20, 0.9), (5, 0.5), (30, 0.95), (5, 0.6), (30, 0.95)]
    assert metrics.pareto_front(points) == [4, 0, 3, 5]


def test_what_pruned_parameters_are_worth_by_hand() -> None:
    assert metrics.pruned_parameter_efficiency(0.9, 0.9, 100, 100) == 1
    assert metrics.pruned_parameter_efficiency(0.45, 0.9, 10, 100) == pytest.approx(5)
    assert metrics.pruned_parameter_efficiency(0.45, 0.0, 10, 100) is None
    points = [(100, 0.90), (20, 0.895), (10, 0.88)]  # 99 % of 0.9 is 0.891
    assert metrics.parameter_slack(points, 0.9, 100) == pytest.approx(0.8)
    assert metrics.parameter_slack([(10, 0.5)], 0.9, 100) is None


def test_who_is_forgotten_by_hand() -> None:
    base = {"cat": 0.9, "dog": 0.8, "eel": 0.7, "fox": 0.5}
    now = {"cat": 0.9, "dog": 0.3, "eel": 0.6, "fox": 0.8}
    forgotten = metrics.forgotten(now, base)
    assert [name for name, _ in forgotten] == ["dog", "eel"]
    assert forgotten[0][1] == pytest.approx(0.5)
    assert len(metrics.forgotten(now, base, most=1)) == 1


def test_recall_by_hand() -> None:
    predicted, labels = torch.tensor([0, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 0, 3])
    assert quality.recall(predicted, labels, ["a", "b", "c", "d"]) == {"a": pytest.approx(2 / 3), "b": 1.0, "d": 0.0}


def test_percentiles_by_hand() -> None:
    assert speed.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert speed.percentile(list(map(float, range(1, 101))), 0.95) == 95.0
    assert speed.percentile([7.0], 0.95) == 7.0


def test_a_front_takes_the_newest_row_of_a_model() -> None:
    rows = [
        ("r", {"model": "a", "backend": "eager", "bytes": 10, "loss": 2.0}),
        ("r", {"model": "b", "backend": "eager", "bytes": 5, "loss": 3.0}),
        ("r", {"model": "c", "backend": "eager", "bytes": 11, "loss": 2.5}),
        ("r", {"model": "b", "backend": "eager", "bytes": 9, "loss": 1.0}),
        ("r", {"model": "d", "backend": "eager", "bytes": 1}),
    ]
    assert [(row["model"], row["bytes"]) for row in front(rows, "bytes", "loss")] == [("b", 9)]
    with pytest.raises(CannotExport, match="there are bytes, loss"):
        front(rows, "bytes", "acuracy")
    assert front([], "bytes", "loss") == []


# -- instruments -----------------------------------------------------------------------------------------------------
def test_timing_separates_a_slow_call_from_a_fast_one() -> None:
    cases = {"slow": (lambda: time.sleep(0.02), 4), "fast": (lambda: time.sleep(0.002), 4)}
    timings = speed.timings(cases, rounds=2, round_seconds=0.05, watts_per_device=10.0)
    assert 20 <= timings["slow"].p50_ms <= timings["slow"].p95_ms
    assert timings["slow"].p50_ms > 3 * timings["fast"].p50_ms
    assert timings["slow"].samples_per_second < 4 / 0.02
    assert timings["slow"].cpu_ms < 10  # it sleeps
    assert timings["slow"].joules_per_sample > timings["fast"].joules_per_sample > 0


def test_flops_and_parameters_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    with torch.no_grad():
        model[0].weight[:4] = 0  # a quarter of its rows
        model[0].bias.fill_(1)
        model[2].weight.fill_(1)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    flops = footprint.forward_flops(Named(), {"x": torch.ones(3, 8)})
    assert flops.realised == 2 * 3 * (8 * 16 + 16 * 4)
    assert flops.counted == pytest.approx(2 * 3 * (0.75 * 8 * 16 + 16 * 4))
    assert footprint.parameters(model) == {"parameters": 8 * 16 + 16 + 64, "nonzero": 0.75 * 8 * 16 + 16 + 64}


def test_low_rank_keeps_the_energy_requested() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(30, 3) @ torch.randn(3, 40))
    model = nn.Sequential(layer, nn.Linear(30, 30))
    factorized = low_rank.factorized(model, 0.999999)
    assert low_rank.ranks(factorized) == {"0": 3}  # the second has full rank: two layers would be larger
    x = torch.randn(5, 40)
    assert torch.allclose(factorized(x), model(x), atol=1e-4)
    fresh = low_rank.shaped(model, {"0": 3})
    fresh.load_state_dict(factorized.state_dict())
    assert torch.equal(fresh.eval()(x), factorized(x))


# -- a model against another -----------------------------------------------------------------------------------------
def test_a_run_is_measured_like_its_own_validation(runs: Path) -> None:
    run_dir = finished("digits", runs)
    metrics_of_run = json.loads((run_dir / "summary.json").read_text())["metrics"]
    measured = measure(str(run_dir), QUICK)
    assert measured["accuracy"] == pytest.approx(metrics_of_run["val_accuracy"], abs=1e-6)
    assert measured["loss"] == pytest.approx(metrics_of_run["val_loss"], rel=1e-4)
    assert measured["bytes"] == (run_dir / "final" / "model.safetensors").stat().st_size
    assert measured["parameters"] == 64 * 64 + 64 + 640 + 10
    assert measured["nonzero"] < 0.3 * measured["parameters"]
    assert measured["flops_realised"] == 2 * (64 * 64 + 640) > measured["flops_counted"] > 0
    assert measured["timings"]["eager 1"]["calls"] >= 3 and measured["cpu_ms"] > 0 and measured["joules_per_sample"] > 0


def test_every_backend_runs_the_same_model_in_the_same_rounds(runs: Path) -> None:
    backends = ("eager", "compile", "onnxruntime")
    target = open_target(str(finished("digits", runs)))
    batch = target.batch((4,))
    logits = [target.logits_function(backend)(batch) for backend in backends]
    assert all(torch.allclose(out, logits[0], atol=1e-5) for out in logits) and logits[0].shape == (4, 10)
    measured = measure(target.name, MeasureOptions(memory=False, rounds=1, backends=backends, shapes=((2,),)))
    assert list(measured["timings"]) == [f"{backend} 2" for backend in backends]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_text_models_are_measured_like_their_own_validation(name: str, runs: Path) -> None:
    run_dir = finished(name, runs)
    metrics_of_run = json.loads((run_dir / "summary.json").read_text())["metrics"]
    measured = measure(str(run_dir), MeasureOptions(memory=False, rounds=1, shapes=((1, 16), (2, 8))))
    assert measured["loss"] == pytest.approx(metrics_of_run["val_loss"], rel=1e-3)
    assert measured["timings"].keys() == {"eager 1x16", "eager 2x8"}
    assert measured["flops_realised"] > 0
    if name == "bert":
        assert measured["recall"].keys() <= {str(c) for c in open_run(run_dir).task.facts["classes"]}


def test_an_int8_onnx_file_against_the_run_it_is_from(runs: Path, tmp_path: Path) -> None:
    run_dir = finished("digits", runs)
    made = export(open_run(run_dir), "onnx", out=tmp_path / "small", quantize="int8")
    measured = measure(str(tmp_path / "small" / "model.onnx"), QUICK, baseline=str(run_dir))
    assert measured["bytes"] == made.files["model.onnx"]
    assert measured["parameters"] == 64 * 64 + 64 + 640 + 10
    assert measured["timings"].keys() == {"onnxruntime 1", "baseline eager 1"}
    comparison = measured["against"]
    dense = comparison["baseline_accuracy"]
    share = measured["nonzero"] / measured["parameters"]
    assert comparison["pruned_parameter_efficiency"] == pytest.approx(measured["accuracy"] / dense / share)
    assert abs(comparison["accuracy_difference"]) < 0.05
    assert "Shoestring's own" in comparison["formulas"]
    assert all(loss > 0 for _, loss in comparison["forgotten"])


def test_peak_memory_is_that_of_a_fresh_process(runs: Path) -> None:
    ballast = torch.ones(200_000_000)  # 800 MB here must not be counted there
    memory = footprint.peak_memory(str(finished("digits", runs)), None, "eager", (1,), False)
    assert ballast.sum() > 0
    assert 0 < memory["over_idle_bytes"] < memory["peak_bytes"]
    assert memory["over_idle_bytes"] < 600e6
    assert memory["peak_bytes"] > 50e6


def test_measurements_are_rows_of_the_ledger_and_make_a_front(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "measured"
    shutil.copytree(finished("digits", runs), run_dir)
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    export(open_run(run_dir), "torch", quantize="int8", sparse=True)
    small = run_dir / "export" / "torch-int8-sparse"
    before = Ledger().index(run_dir) and Ledger().run("digits")
    for model in (run_dir, small):
        assert command(monkeypatch, "measure", str(model), "--no-memory", "--json") == 0
        assert json.loads(capsys.readouterr().out)["recorded"] is True
    rows = [row.fields for row in Ledger().measurements("digits") if row.fields["window"] == "model"]
    assert [row["form"] for row in rows] == ["run", "torch"]
    assert rows[1]["bytes"] == (small / "model.safetensors").stat().st_size < rows[0]["bytes"]
    after = Ledger().run("digits")
    assert (after.attempts, after.seconds, after.status) == (before.attempts, before.seconds, "finished")
    problems: list[Any] = []
    assert list(read(run_dir / "events", problems)) and problems == []
    assert command(monkeypatch, "runs", "pareto", "--json") == 0
    front = json.loads(capsys.readouterr().out)
    assert front[0]["model"] == str(small) and front[0]["run"] == before.id
    assert command(monkeypatch, "runs", "pareto", "--y", "colour") == 2
    assert "accuracy" in capsys.readouterr().err


def test_a_measured_run_that_goes_on_is_charged_nothing_for_it(runs: Path, tmp_path: Path) -> None:
    from shoestring.trainer.export.measurement import record
    from shoestring.trainer.monitor.records import _unseen

    run_dir = tmp_path / "again"
    shutil.copytree(finished("digits", runs), run_dir)
    before = list(read(run_dir / "events", rank=0))
    assert record({"model": "x", "backend": "eager"}, run_dir)
    rows = list(read(run_dir / "events", rank=0))
    assert len(rows) == len(before) + 1 and rows[-1].kind == "measurement"
    last = next(row for row in reversed(rows) if row.kind == "step")
    assert _unseen(rows, last) == _unseen(before, last) == 0


def test_what_cannot_be_measured_is_said_in_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = str(finished("digits", runs))
    for words, said in (
        (["measure", str(tmp_path)], "is no run, no Hugging Face folder"),
        (["measure", "absent.onnx"], "no such file"),
        (["measure", run_dir, "--backend", "tpu"], "eager, compile, onnxruntime"),
        (["measure", run_dir, "--batch", "1x128"], "takes N"),
        (["measure", run_dir, "--batch", "two"], "rows x tokens"),
        (["compress", run_dir], "--budget-bytes"),
        (["compress", run_dir, "--budget-bytes", "5 parsecs"], "25MB"),
    ):
        assert command(monkeypatch, *words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error, error
