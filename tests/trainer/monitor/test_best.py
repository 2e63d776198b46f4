"""The weights of the best evaluation are kept, patience ends a run, and checkpoints come as often as is best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import best_ranks
import pytest
import small
import torch
from best_ranks import Judged
from hypothesis import given
from hypothesis import strategies as st
from processes import succeed

from shoestring.callbacks import WeightAveraging
from shoestring.trainer import Budget
from shoestring.trainer.checkpoint.weights import load_weights, weights_problem
from shoestring.trainer.ledger.lines import read
from shoestring.trainer.monitor.evaluations import UnknownMetric
from shoestring.trainer.monitor.intervals import DAY, LONGEST, best_interval, between_failures

pytestmark = [pytest.mark.filterwarnings(line) for line in small.QUIET]
nan = math.nan


def run(folder: Path, scores: list[float], **how: Any) -> tuple[Judged, dict[str, Any]]:
    """Two steps between evaluations."""
    module = Judged(scores)
    steps = how.pop("steps", 2 * len(scores))
    options = {"best": "max val_score", "check_val_every_n_epoch": None, "val_check_interval": 2, **how}
    trainer = small.train(folder, Budget(steps=steps), module=module, validation=small.loader(8), **options)
    return module, trainer.summary


def kept(folder: Path) -> torch.Tensor:
    assert weights_problem(folder / "best") is None
    return load_weights(folder / "best")["net.weight"]


@pytest.mark.parametrize(
    ("judged", "scores", "best"),
    [
        ("max val_score", [0.25, 0.875, 0.875, nan, 0.375], 1),  # an equal one comes too late
        ("min val_score", [0.25, 0.875, nan, 0.125, 0.375], 3),
        ("max val_score", [nan, 0.125, 0.0], 1),
    ],
)
def test_weights_are_those_of_the_best_evaluation(tmp_path: Path, judged: str, scores: list[float], best: int) -> None:
    module, summary = run(tmp_path, scores, best=judged)
    assert summary["best"] == {"metric": "val_score", "value": scores[best], "step": 2 * best + 2}
    assert torch.equal(kept(tmp_path), module.evaluated[best])
    assert not torch.equal(kept(tmp_path), load_weights(tmp_path / "final")["net.weight"])
    rows = [r.fields for r in read(tmp_path / "events", rank=0) if r.fields.get("event") == "best"]
    assert rows[-1]["step"] == 2 * best + 2 and rows[-1]["value"] == scores[best]


def test_they_are_those_that_were_evaluated(tmp_path: Path) -> None:
    """An average along the run is evaluated, and what trains is put back."""
    module, _ = run(tmp_path / "averaged", [0.125, 0.875, 0.375], techniques=[WeightAveraging(decay=0.5)])
    assert torch.equal(kept(tmp_path / "averaged"), module.evaluated[1])
    plain, _ = run(tmp_path / "plain", [0.125, 0.875, 0.375])
    assert not torch.equal(module.evaluated[1], plain.evaluated[1])
    assert module.trained == plain.trained, "keeping the best has changed nothing of the training"


def test_patience_ends_the_run(tmp_path: Path) -> None:
    _, summary = run(tmp_path, [0.5, 0.625, 0.125, 0.25, nan, 0.875, 0.875], patience=3)
    assert (summary["steps"], summary["stopped_by"]) == (10, "patience")
    assert summary["best"]["step"] == 4 and (tmp_path / "final").exists()


def test_a_resumed_run_judges_as_an_undisturbed_one(tmp_path: Path) -> None:
    scores = [0.5, 0.75, 0.125, 0.25, 0.375, 0.875]
    with pytest.raises(RuntimeError, match="crashed"):
        run(tmp_path, scores, patience=3, checkpoint_every="1 steps", callbacks=[small.Crash(7)])
    before = kept(tmp_path)
    _, summary = run(tmp_path, scores[3:], patience=3, steps=12)
    assert summary["resumed_from"] == 7 and (summary["steps"], summary["stopped_by"]) == (10, "patience")
    assert summary["best"] == {"metric": "val_score", "value": 0.75, "step": 4} and torch.equal(kept(tmp_path), before)


def test_ranks_keep_one_file(tmp_path: Path) -> None:
    """Each rank measures something else; the first one's word holds, and what it keeps is whole."""
    succeed(best_ranks.main, ["ddp", "zero3"], tmp_path, world=2, folder=tmp_path, timeout=120)
    ddp, zero3 = (kept(tmp_path / name) for name in ("ddp", "zero3"))
    assert ddp.shape == zero3.shape == (1, small.WIDTH)
    assert torch.allclose(ddp, zero3, atol=1e-6)


def test_what_nobody_measures_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UnknownMetric, match=r"val_scores: an evaluation measures .*val_score; did you mean"):
        run(tmp_path, [0.125], best="max val_scores")
    with pytest.raises(UnknownMetric, match="patience needs best"):
        small.train(tmp_path, Budget(steps=1), patience=2)


@given(cost=st.floats(0.01, 100), mtbf=st.floats(1e4, 1e6), other=st.floats(0.2, 5))
def test_no_other_interval_costs_less(cost: float, mtbf: float, other: float) -> None:
    def wasted(every: float) -> float:
        return cost / every + every / (2 * mtbf)

    every = best_interval(cost, mtbf)
    if 10 * cost < every < LONGEST:
        assert wasted(every) <= wasted(other * every) * (1 + 1e-9)
    assert best_interval(cost, 1e-3) == pytest.approx(10 * cost), "a run that is always interrupted still trains"


def test_the_interval_follows_what_is_measured(tmp_path: Path) -> None:
    trainer = small.train(tmp_path, Budget(steps=40), module=small.Small(0.01), checkpoint_every="auto", mtbf=1e-3)
    checkpoints = trainer.monitor.checkpoints
    cost = checkpoints._stall or checkpoints.saver.seconds
    assert checkpoints.every.amount == pytest.approx(10 * cost)
    saved = [r for r in read(tmp_path / "events", rank=0) if r.fields.get("event") == "checkpoint"]
    assert len(saved) >= 2 and saved[0].fields["step"] == 1 and saved[-1].fields["step"] == 40
    assert between_failures(0.0, 0, nodes=2) == DAY / 2
    assert between_failures(3600.0, 3, nodes=8) == (DAY / 8 + 3600) / 4
