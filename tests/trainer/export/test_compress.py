"""The search for the best model within a budget, among real exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finished import finished
from torch import nn

from shoestring.trainer.export import compress, low_rank
from shoestring.trainer.export.candidates import Candidate, all_candidates, int8_tables, least_bytes
from shoestring.trainer.export.candidates import low_rank as low_rank_of
from shoestring.trainer.export.compress import Limits, NothingFits, Tried, search
from shoestring.trainer.export.measurement import MeasureOptions, measure
from shoestring.trainer.export.runtimes import calibration
from shoestring.trainer.export.trained import CannotExport, Trained, open_run

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = MeasureOptions(memory=False, rounds=1)


FEW = (
    Candidate(name="float32"), Candidate(name="int8", quantize="int8"), Candidate(name="int4", quantize="int4"),
    Candidate(name="low-rank", quantize="int8", change=lambda run: low_rank.factorized(run.model, 0.5)),
    Candidate(name="never", to="hf"),
)  # fmt: skip


def test_the_best_model_within_the_budget_is_kept(runs: Path, tmp_path: Path) -> None:
    trained = open_run(finished("digits", runs))
    sizes = {t.name: t for t in search(trained, Limits(bytes=1e9), out=tmp_path / "all", candidates=FEW).tried}
    assert sizes["int4"].problem is None and "MLP" in str(sizes["never"].problem)
    limit = int(sizes["int8"].bytes or 0)
    assert limit < int(sizes["float32"].bytes or 0)
    result = search(trained, Limits(bytes=limit), out=tmp_path / "out", candidates=FEW)
    fitting = {t.name: t.accuracy for t in result.tried if t.fits}
    assert "float32" not in fitting and "int8" in fitting
    assert fitting[str(result.chosen)] == max(fitting.values())
    measured = measure(str(tmp_path / "out"), QUICK)
    chosen = next(t for t in result.tried if t.name == result.chosen)
    assert (measured["accuracy"], measured["bytes"]) == (pytest.approx(chosen.accuracy), chosen.bytes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "out"]


def test_nothing_fits_and_the_smallest_is_named(runs: Path, tmp_path: Path) -> None:
    result = search(open_run(finished("digits", runs)), Limits(bytes=10), out=tmp_path / "out", candidates=FEW)
    smallest = min((t for t in result.tried if t.bytes), key=lambda t: t.bytes or 0)
    with pytest.raises(NothingFits, match=rf"smallest is {smallest.name} with {smallest.bytes:,} bytes"):
        result.require_fit()
    assert list(tmp_path.iterdir()) == []


def test_a_low_rank_candidate_is_read_back_in_its_own_shape(runs: Path, tmp_path: Path) -> None:
    trained = open_run(finished("bert", runs))
    factorized = Candidate(name="low-rank", change=lambda run: low_rank.factorized(run.model, 0.3))
    result = search(trained, Limits(bytes=1e9), out=tmp_path / "out", candidates=[factorized])
    assert result.chosen == "low-rank"
    measured = measure(str(tmp_path / "out"), MeasureOptions(memory=False, rounds=1, shapes=((1, 8),)))
    assert measured["parameters"] < measure(str(trained.run_dir), MeasureOptions(memory=False, rounds=1))["parameters"]
    assert measured["accuracy"] == pytest.approx(result.tried[0].accuracy)


def test_half_the_weights_go_by_what_they_do_to_training_samples(runs: Path, tmp_path: Path) -> None:
    trained = open_run(finished("bert", runs))
    wanted = [c for c in all_candidates(trained) if c.name in ("int8", "sparsegpt 50% int8", "wanda 50% int8")]
    result = search(trained, Limits(bytes=1e9), out=tmp_path / "out", candidates=wanted)
    sizes = {tried.name: tried.bytes for tried in result.tried}
    assert len(sizes) == 3 and not any(tried.problem for tried in result.tried)
    pruned = wanted[1].change(trained)  # type: ignore[misc]
    linear = {f"{n}.weight": m.weight for n, m in pruned.named_modules() if isinstance(m, nn.Linear)}
    assert all(abs(float((w == 0).float().mean()) - 0.5) < 0.02 for w in linear.values())
    # a bit for the mask and a byte for every second weight; the header names each weight's parts
    saved = sum(w.numel() for w in linear.values()) * (1 - 0.5 - 1 / 8)
    for name in ("sparsegpt 50% int8", "wanda 50% int8"):
        assert saved - 150 * len(linear) < int(sizes["int8"] or 0) - int(sizes[name] or 0) < 1.05 * saved
    assert not any((w == 0).any() for n, w in trained.model.named_parameters() if n in linear), "a copy was pruned"


def test_calibration_samples_are_drawn_from_the_training_data(runs: Path) -> None:
    trained = open_run(finished("digits", runs))
    batches, again = calibration(trained, samples=20, rows=8), calibration(trained, samples=20, rows=8)
    assert [[*b] for b in batches] == [["pixel_values"]] * 3
    drawn = torch.cat([b["pixel_values"] for b in batches])
    assert len(drawn) == 20 and torch.equal(drawn, torch.cat([b["pixel_values"] for b in again]))
    data = trained.task.train
    known = {tuple(data[i]["pixel_values"].flatten().tolist()) for i in range(len(data))}  # type: ignore[index, arg-type]
    assert {tuple(row.flatten().tolist()) for row in drawn} <= known
    assert not torch.equal(drawn[:8], torch.stack([data[i]["pixel_values"] for i in range(8)])), "not just the first"  # type: ignore[index]


def test_the_choice_by_hand() -> None:
    tried = [
        Tried(name="big", backend="eager", bytes=100, accuracy=0.9, loss=0.1, fits=True),
        Tried(name="same", backend="eager", bytes=50, accuracy=0.9, loss=0.1, fits=True),
        Tried(name="better", backend="eager", bytes=10, accuracy=0.99, loss=0.1, fits=False),
        Tried(name="broken", backend="eager", problem="no"),
    ]
    chosen = compress.best(tried)
    assert chosen is not None and chosen.name == "same"
    assert compress.best(tried[2:]) is None


def test_limits_are_read_in_units() -> None:
    assert Limits.parse("25MB", "5ms") == Limits(bytes=25e6, milliseconds=5.0)
    assert Limits.parse("1.5 KiB", None) == Limits(bytes=1536.0)
    assert Limits.parse(None, "250us") == Limits(milliseconds=0.25)


def test_the_table_begins_with_the_model_before(runs: Path, tmp_path: Path) -> None:
    trained = open_run(finished("digits", runs))
    result = search(trained, Limits(bytes=1e9), out=tmp_path / "out", candidates=FEW)
    (before,) = result.before
    assert (before.name, before.bytes) == ("before", (trained.run_dir / "final" / "model.safetensors").stat().st_size)
    same = next(t for t in result.tried if t.name == "float32")
    assert (before.accuracy, before.loss) == (same.accuracy, same.loss)
    assert before.latency_ms is not None


def test_bytes_are_known_before_anything_is_written(runs: Path, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))  # 6 weights and 2 biases, none of them 0
    assert least_bytes(model, Candidate(name="", quantize=None)) == 8 * 4
    assert least_bytes(model, Candidate(name="", quantize="float16")) == 8 * 2
    assert least_bytes(model, Candidate(name="", quantize="int8")) == 6 + 2 * 4 + 2 * 4  # values, scales, biases
    assert least_bytes(model, Candidate(name="", to="onnx")) == 8 * 4
    assert least_bytes(model, Candidate(name="", to="onnx", quantize="int8")) == 6 + 2 * 4
    trained = open_run(finished("digits", runs))
    result = search(trained, Limits(bytes=1e9), out=tmp_path / "out", candidates=FEW[:3])
    for candidate, tried in zip(FEW, result.tried, strict=False):
        assert tried.bytes is not None
        assert 0 < tried.bytes - least_bytes(trained.model, candidate) < 4000, tried  # the header


def test_what_is_much_too_large_is_not_written(runs: Path, tmp_path: Path) -> None:
    trained = open_run(finished("digits", runs))
    limit = least_bytes(trained.model, FEW[0]) / 1.15
    tried = {t.name: t for t in search(trained, Limits(bytes=limit), out=tmp_path / "out", candidates=FEW).tried}
    assert tried["float32"].skipped and tried["float32"].accuracy is None and not tried["int8"].skipped
    assert tried["float32"].bytes == least_bytes(trained.model, FEW[0])


def run_of(model: nn.Module) -> Trained:
    """A run that has trained `model`: all that a candidate's change asks of it."""
    return Trained(Path(), "", None, None).with_model(model)  # type: ignore[arg-type]


def test_a_model_of_full_rank_has_no_smaller_form_of_the_same_rank() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 12))
    with pytest.raises(CannotExport, match=r"no layer is smaller at the rank that keeps 0\.999999"):
        low_rank_of(0.999999)(run_of(model))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(12, 2) @ torch.randn(2, 12))
    assert low_rank.ranks(low_rank_of(0.999999)(run_of(model))) == {"1": 2}


def test_embeddings_are_stored_in_bytes_where_no_other_layer_needs_them() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 2))
    small = int8_tables(run_of(model))
    ids = torch.arange(50)[None]
    assert float((small(ids) - model(ids)).abs().max()) < 0.05
    assert least_bytes(small, Candidate(name="", to="onnx", quantize="int8")) == 50 * 8 + 50 * 4 + 2 * 8 + 2 * 4
    with pytest.raises(CannotExport, match="no embedding"):
        int8_tables(run_of(model[1]))
