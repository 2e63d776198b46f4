"""Losses and gradients that are not finite: skipped, told, stopped in time, and never saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import poisoned
import pytest
import small
import torch
from poisoned import Poisoned
from processes import succeed
from pytorch_lightning import Callback

from shoestring.trainer.checkpoint.format import newest_intact, steps
from shoestring.trainer.checkpoint.saver import NotFinite
from shoestring.trainer.monitor.nonfinite import NonFiniteSteps

pytestmark = [pytest.mark.filterwarnings(line) for line in small.QUIET]


def test_a_step_without_finite_gradients_changes_nothing_and_is_told(tmp_path: Path, caplog) -> None:
    done = poisoned.train(tmp_path, "single", 1, {2})
    weights = done["weights"]
    assert weights[2] == weights[1], "neither weights nor moments have moved"
    assert len({tuple(each) for each in weights}) == 5
    assert done["steps"] == 1 and done["events"] == [
        {"event": "nonfinite", "step": 3, "batch": 2, "loss": "nan", "skipped": True}
    ]
    assert "rank 0, step 3: a loss that is not finite" in caplog.text and "micro-batch 2" in caplog.text


def test_strategies_skip_alike(tmp_path: Path) -> None:
    """One rank's loss is NaN, so all ranks' gradients are."""
    succeed(poisoned.main, ["ddp", "zero2", "zero3", "fsdp2"], tmp_path, world=2, folder=tmp_path, timeout=120)
    for rank in range(2):
        report = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for strategy, seen in report.items():
            assert seen["weights"][2] == seen["weights"][1], strategy
            assert seen["weights"][3] != seen["weights"][2], strategy
            assert seen["steps"] == 1, strategy
            assert [(e["step"], e["batch"], e["loss"]) for e in seen["events"]] == [(3, 2, "nan")], strategy
            for ours, theirs in zip(seen["weights"], report["ddp"]["weights"], strict=True):
                assert ours[:8] == pytest.approx(theirs[:8], abs=1e-5), strategy


@pytest.mark.parametrize("worst", [1e30, -3e38, math.inf, -math.inf, math.nan])
def test_gradients_whose_squares_have_no_number_are_finite(worst: float) -> None:
    gradient = torch.full((300,), 1e30)
    gradient[-1] = worst
    assert NonFiniteSteps(1, print).one_is(gradient) is math.isfinite(worst)


def test_so_many_end_the_run_and_leave_what_was_good(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"3 steps .*nonfinite_steps"):
        small.train(
            tmp_path, module=Poisoned({*range(4, 16)}), max_steps=12, checkpoint_every="1 steps", nonfinite_steps=3
        )
    folder, problems = newest_intact(tmp_path / "checkpoints")
    assert folder is not None and not problems and not (tmp_path / "final").exists()
    resumed = small.train(tmp_path, max_steps=12)
    assert resumed.summary["resumed_from"] == int(folder.name) and resumed.summary["steps"] == 12
    assert all(p.isfinite().all() for p in resumed.lightning_module.parameters())


class Overflow(Callback):
    """Weights that are infinite although every gradient was finite, after step `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.at:
            with torch.no_grad():
                next(pl_module.parameters())[0, 0] = math.inf


def test_infinite_weights_are_never_kept(tmp_path: Path, caplog) -> None:
    with pytest.raises(NotFinite, match=r"ended at step 6, .*master/net.weight.* are from before"):
        small.train(tmp_path, max_steps=6, checkpoint_every="2 steps", keep_checkpoints=1, callbacks=[Overflow(5)])
    assert steps(tmp_path / "checkpoints") == [4] and not (tmp_path / "final").exists()
    assert "no checkpoint of step 6 in " in caplog.text and "master/net.weight is not finite" in caplog.text
