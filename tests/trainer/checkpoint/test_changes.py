"""Resumed with something else: what acts as it is set is applied and said, what would be another run is refused."""

import pytest
import pytorch_lightning as pl
import torch
from small import QUIET, Small, loader, train

from shoestring.callbacks import GradualPruning, LRScaling, LRSchedule
from shoestring.trainer import Budget
from shoestring.trainer.checkpoint.changes import ChangedRun

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Tuned(Small):
    """With a rate, a decay, an optimizer and a scheduler to choose; notes what acts in each step."""

    def __init__(self, lr=0.1, decay=0.5, optimizer="AdamW", scheduled=False):
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.acts = []

    def on_before_optimizer_step(self, optimizer):
        group = optimizer.param_groups[0]
        self.acts.append((group["lr"], group["weight_decay"]))

    def configure_optimizers(self):
        own = self.hparams
        optimizer = getattr(torch.optim, own.optimizer)(self.parameters(), lr=own.lr, weight_decay=own.decay)
        if not own.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Crash(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4:
            raise RuntimeError("crashed")


def resumed(folder, first, then, *, techniques=(), others=None, before=None, **options):
    """What acts in steps 4 to 7, where a run of eight is stopped at the fourth and goes on with `then`."""
    with pytest.raises(RuntimeError, match="crashed"):
        train(
            folder, Budget(steps=8), module=first, techniques=techniques, callbacks=[Crash()],
            checkpoint_every="1 step", **(before or {}),
        )  # fmt: skip
    chosen = techniques if others is None else others
    train(folder, Budget(steps=8), module=then, techniques=chosen, **options)
    return then.acts


def said(caplog):
    return [r.message for r in caplog.records if r.message.startswith("resumed with changes")]


CONSTANT = lambda: [LRSchedule(shape="constant")]  # noqa: E731


def test_nothing_is_said_where_nothing_has_changed(tmp_path, caplog):
    resumed(tmp_path, Tuned(), Tuned(), techniques=CONSTANT())
    assert said(caplog) == []


def test_another_rate_and_decay_act_from_the_resumed_step_on(tmp_path, caplog):
    acts = resumed(tmp_path, Tuned(), Tuned(lr=0.01, decay=0.0), techniques=CONSTANT())
    assert acts == [(pytest.approx(0.01), 0.0)] * 4
    (line,) = said(caplog)
    assert "lr 0.1 -> 0.01" in line and "weight_decay 0.5 -> 0.0" in line


def test_another_rate_acts_under_a_schedule_scaling_and_the_modules_scheduler(tmp_path):
    middle = [1 - (s + 0.5) / 8 for s in range(4, 8)]
    acts = resumed(tmp_path / "schedule", Tuned(), Tuned(lr=0.05))
    assert [lr for lr, _ in acts] == pytest.approx([0.05 * p for p in middle])
    acts = resumed(tmp_path / "scaled", Tuned(), Tuned(lr=0.05), techniques=[LRScaling(base_batch=1), LRSchedule()])
    assert [lr for lr, _ in acts] == pytest.approx([2 * 0.05 * p for p in middle])
    acts = resumed(tmp_path / "own", Tuned(scheduled=True), Tuned(lr=0.05, scheduled=True))
    assert [lr for lr, _ in acts] == pytest.approx([0.05 * 0.9**s for s in range(4, 8)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gradient_clip_val": 0.5}, "gradient_clip_val None -> 0.5"),
        ({"precision": "bf16-mixed"}, "precision 32-true -> bf16-mixed"),
    ],
    ids=str,
)
def test_clipping_and_precision_act_and_are_said(tmp_path, caplog, options, says):
    resumed(tmp_path, Tuned(), Tuned(), **options)
    assert says in said(caplog)[0]


def test_other_code_is_said(tmp_path, caplog):
    class Other(Tuned):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    Other.__name__ = "Tuned"
    resumed(tmp_path, Tuned(), Other())
    assert said(caplog) == ["resumed with changes, which act from here on: the code of Tuned"]


PRUNING = {"start": "0%", "end": "50%", "every": 2}


@pytest.mark.parametrize(
    ("techniques", "others", "then", "says"),
    [
        ([], [GradualPruning(sparsity=0.5, **PRUNING)], {}, "technique gradual_pruning added"),
        ([GradualPruning(sparsity=0.5, **PRUNING)], [], {}, "technique gradual_pruning removed"),
        (
            [GradualPruning(sparsity=0.5, **PRUNING)], [GradualPruning(sparsity=0.9, **PRUNING)], {},
            r"technique gradual_pruning .*'sparsity': 0\.5.* -> .*'sparsity': 0\.9",
        ),
        ([], [], {"optimizer": "Adam"}, "optimizer AdamW -> Adam"),
    ],
    ids=["added", "removed", "changed", "optimizer"],
)  # fmt: skip
def test_what_would_be_another_run_is_refused_until_it_is_accepted(tmp_path, caplog, techniques, others, then, says):
    with pytest.raises(ChangedRun, match=rf"{says}.* Give another run_dir, or accept_changes=True"):
        resumed(tmp_path, Tuned(), Tuned(**then), techniques=techniques, others=others)
    trainer = train(tmp_path, Budget(steps=8), module=Tuned(**then), techniques=others, accept_changes=True)
    assert trainer.summary["resumed_from"] == 4 and trainer.summary["steps"] == 8
    assert len(said(caplog)) == 1


def test_other_parameter_groups_are_refused(tmp_path):
    class Two(Tuned):
        def configure_optimizers(self):
            groups = [{"params": [p]} for p in (self.net.weight, self.extra)]
            return torch.optim.AdamW(groups, lr=0.1)

        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Parameter(torch.zeros(1))

    train(tmp_path, Budget(steps=2), data=loader())
    with pytest.raises(ChangedRun, match="other parameter groups"):
        train(tmp_path, Budget(steps=4), module=Two())
