"""How much is pruned when, and what may be pruned at all."""

from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import QUIET, train
from torch import nn

from shoestring.callbacks import GradualPruning
from shoestring.callbacks.contract import Misconfigured
from shoestring.callbacks.sparsity.schedules import cubic
from shoestring.trainer import Budget

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

# 0.8 (1 - (1 - t)^3), by hand
BY_HAND = {
    0.1: 0.2168, 0.2: 0.3904, 0.3: 0.5256, 0.4: 0.6272, 0.5: 0.7, 0.6: 0.7488, 0.7: 0.7784, 0.8: 0.7936, 0.9: 0.7992,
    1.0: 0.8,
}  # fmt: skip


def test_the_cubic_schedule_at_ten_points():
    assert {t: cubic(t, 0.8) for t in BY_HAND} == pytest.approx(BY_HAND)
    assert cubic(0.5, 0.8, initial=0.4) == pytest.approx(0.8 - 0.4 / 8)
    assert (cubic(-1, 0.8), cubic(0, 0.8), cubic(2, 0.8)) == (0, 0, 0.8)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.999))
def test_it_never_falls_and_never_exceeds_its_end(one, two, final):
    early, late = sorted((one, two))
    assert 0 <= cubic(early, final) <= cubic(late, final) <= final


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"every": 0}, "every=0"),
        ({"start": "70%", "end": "10%"}, "end='10%'.*later moment than start='70%', in the same unit"),
        ({"start": "5 steps", "end": "70%"}, "end='70%'.*start='5 steps', in the same unit"),
    ],
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(Misconfigured, match=f"gradual_pruning: {named}"):
        GradualPruning(**settings).check()


class Wide(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 125)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Recorder(pl.Callback):
    def __init__(self):
        self.zeros = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        weight = pl_module.net.weight
        self.zeros.append((weight == 0).flatten())
        state = trainer.optimizers[0].state[weight]
        if not state:  # before the first step
            return
        assert not state["exp_avg"].flatten()[self.zeros[-1]].any()
        assert not state["exp_avg_sq"].flatten()[self.zeros[-1]].any()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_follows_the_schedule_to_the_weight(tmp_path, accumulate):
    """From 10 % to 70 % of twenty steps: at step s the ramp is (s / 20 - 0.1) / 0.6."""
    recorder, technique = Recorder(), GradualPruning(sparsity=0.8, every=1)
    train(
        tmp_path, Budget(steps=20), module=Wide(), techniques=[technique], callbacks=[recorder],
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    zeros = recorder.zeros[accumulate - 1 :: accumulate]
    wanted = [int(cubic((s / 20 - 0.1) / 0.6, 0.8) * 1000) for s in range(20)]
    assert [int(z.sum()) for z in zeros] == wanted and wanted[5] == 462 and wanted[-1] == 800
    assert all((later | ~earlier).all() for earlier, later in pairwise(zeros)), "a weight came back"
    assert technique.densities() == {"net.weight": 0.2}


def test_between_prunings_the_masks_stay(tmp_path):
    recorder = Recorder()
    technique = GradualPruning(sparsity=0.8, every=7)
    train(tmp_path, Budget(steps=20), module=Wide(), techniques=[technique], callbacks=[recorder])
    counts = [int(z.sum()) for z in recorder.zeros]
    changes = [step for step, (before, after) in enumerate(pairwise([0, *counts])) if before != after]
    assert changes == [3, 7, 14] and counts[-1] == int(cubic((14 / 20 - 0.1) / 0.6, 0.8) * 1000)
