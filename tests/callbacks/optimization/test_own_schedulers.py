"""A scheduler that the module brings stays, unless a schedule is asked for; both say so in one line."""

import pytest
import pytorch_lightning as pl
import torch
from small import QUIET, Small, loader, train

from shoestring.callbacks import LRSchedule
from shoestring.trainer import Budget

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Cycled(Small):
    """One cycle in ten steps, up to 0.5; `every`: how Lightning steps it."""

    every = "step"

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": self.every}]

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=11, cycle_momentum=False)


class ByEpoch(Cycled):
    every = "epoch"

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


class Rates(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def rates(folder, module, *techniques, **options):
    seen = Rates()
    train(folder, Budget(steps=10), module=module, techniques=techniques, callbacks=[seen], **options)
    return seen.seen


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def alone(steps=10):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = Cycled().scheduler(optimizer)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_budget_leaves_the_rate_to_the_modules_scheduler(tmp_path, caplog, accumulate):
    assert rates(tmp_path, Cycled(), accumulate_grad_batches=accumulate) == pytest.approx(alone())
    said = [r.message for r in caplog.records if r.name == "shoestring"]
    assert said == [message for message in said if "the module's own OneCycleLR sets the learning rate" in message]
    assert len(said) == 1


def test_a_scheduler_by_epoch_stays_too(tmp_path):
    assert rates(tmp_path, ByEpoch(), data=loader(16)) == pytest.approx([0.1] * 4 + [0.05] * 4 + [0.025] * 2)


def test_a_schedule_that_is_asked_for_sets_the_rate_from_the_schedulers_peak(tmp_path, caplog):
    seen = rates(tmp_path, Cycled(), LRSchedule(shape="linear"))
    assert seen == pytest.approx([0.5 * (1 - (s + 0.5) / 10) for s in range(10)])
    assert "lr_schedule sets the learning rate; the module's own OneCycleLR has no effect" in caplog.text
