"""What changes in mid-run goes on exactly: schedulers by epoch and on plateau, parameters that train for a time."""

import pytest
import pytorch_lightning as pl
import torch
from small import QUIET, WIDTH, Small, loader, train
from torch import nn

from shoestring.callbacks.parameters.shards import NoShard
from shoestring.trainer import Budget
from shoestring.trainer.checkpoint.state import AnotherModel

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET] + [
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training")
]


class Crash(pl.Callback):
    """In the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.monitor.account.clock.step == self.step:
            raise RuntimeError("crashed")


class Scheduled(Small):
    """`kind` of scheduler; its rates, and the losses of its evaluations."""

    def __init__(self, kind):
        super().__init__(lr=0.1)
        self.kind, self.rates, self.losses = kind, [], []

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_epoch_end(self):
        self.losses.append(round(float(self.trainer.callback_metrics["val_loss"]), 6))

    def configure_optimizers(self):
        optimizer, torch_lr = torch.optim.AdamW(self.parameters(), lr=self.lr), torch.optim.lr_scheduler
        if self.kind == "epoch":
            return [optimizer], [torch_lr.StepLR(optimizer, 1, gamma=0.5)]
        plateau = torch_lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)
        return [optimizer], [{"scheduler": plateau, "monitor": "val_loss"}]


@pytest.mark.parametrize("kind", ["epoch", "plateau"])
@pytest.mark.parametrize("crash", [4, 6, 8])
def test_schedulers_of_epochs_and_plateaus_go_on_where_they_were(tmp_path, kind, crash):
    """Four steps an epoch, saved after each: at the end of an epoch, after its evaluation and its schedulers."""
    options = {
        "max_epochs": 4,
        "data": loader(16),
        "validation": loader(8, shuffle=False),
        "checkpoint_every": "1 step",
    }
    whole, broken, resumed = Scheduled(kind), Scheduled(kind), Scheduled(kind)
    train(tmp_path / "whole", module=whole, **options)
    with pytest.raises(RuntimeError, match="crashed"):
        train(tmp_path / "run", module=broken, callbacks=[Crash(crash)], **options)
    trainer = train(tmp_path / "run", module=resumed, num_sanity_val_steps=0, **options)
    assert trainer.monitor.resumed_from == crash and len(set(whole.rates)) > 2
    assert resumed.rates == whole.rates[crash:]
    assert resumed.losses == whole.losses[-len(resumed.losses) :] and len(resumed.losses) == 4 - crash // 4
    assert torch.equal(whole.net.weight, resumed.net.weight)


class Thawing(Small):
    """Its first layer trains from step 3 to step 9 only."""

    always = False

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.base.requires_grad_(self.always)

    def on_train_batch_start(self, batch, batch_idx):
        self.base.requires_grad_(3 <= self.trainer.global_step < 9)

    def training_step(self, batch, batch_idx):
        return self.net(self.base(batch[0]).relu()).square().mean()


@pytest.mark.parametrize("crash", [2, 4, 7, 11])
def test_parameters_that_train_for_a_time_resume_with_their_moments(tmp_path, crash):
    whole, resumed = Thawing(), Thawing()
    options = {"checkpoint_every": "1 step", "budget": Budget(steps=14)}
    train(tmp_path / "whole", module=whole, **options)
    with pytest.raises(RuntimeError, match="crashed"):
        train(tmp_path / "run", module=Thawing(), callbacks=[Crash(crash)], **options)
    train(tmp_path / "run", module=resumed, **options)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert not torch.equal(whole.base.weight, Thawing().base.weight)


def test_what_was_trained_may_not_come_back_frozen(tmp_path):
    class Open(Thawing):
        always = True

        def on_train_batch_start(self, batch, batch_idx):
            return None

    train(tmp_path, Budget(steps=3), module=Open())
    with pytest.raises(AnotherModel, match=r"base\.weight is frozen, but in the checkpoint it is trained"):
        train(tmp_path, Budget(steps=6), module=Thawing())


@pytest.mark.filterwarnings("ignore")
def test_zero_refuses_what_its_optimizer_was_made_without(tmp_path):
    with pytest.raises(NoShard, match=r"base\.weight has become trainable, .* would never be trained"):
        train(tmp_path, Budget(steps=6), module=Thawing(), strategy="zero1", checkpoint_every="1 step")
