"""A training step run aside leaves nothing behind, and a weight shown straight through gets the gradient."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from shoestring.callbacks.forward.forward_weights import straight_through
from shoestring.callbacks.forward.isolated_step import NoLoss, isolated_training_step, loss_of


class Marking(pl.LightningModule):
    """A step that changes whatever a step can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.still = nn.BatchNorm1d(2), nn.Dropout(0.5).eval()
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x = batch.pop("x") if isinstance(batch, dict) else batch
        self.count += 1
        self.seen = x
        self.still.train()
        self.register_buffer("count", self.count + 1)
        self.log("loss", x.mean())
        return {"loss": self.norm(x).square().mean()}


def test_nothing_is_left_behind_even_by_a_step_that_fails():
    module, batch = Marking(), {"x": torch.ones(3, 2)}
    own = module.log = lambda *_, **__: pytest.fail("logged")
    count, before = module.count, {name: b.clone() for name, b in module.named_buffers()}
    with pytest.raises(ZeroDivisionError), isolated_training_step(module):
        assert loss_of(module, batch).item() == 0.0
        assert module.count == 2 and module.still.training
        raise ZeroDivisionError
    assert module.count is count and not hasattr(module, "seen") and module.log is own
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())
    assert module.training and not module.still.training
    assert list(batch) == ["x"], "the step had a batch of its own to take apart"
    del module.log
    with isolated_training_step(module):
        loss_of(module, batch)
    assert "log" not in vars(module)


def test_a_step_without_a_loss_is_an_error():
    module = Marking()
    module.training_step = lambda batch, batch_idx: None
    with pytest.raises(NoLoss, match="training_step returned NoneType and no loss"):
        loss_of(module, torch.ones(2))


def test_straight_through_shows_one_and_moves_the_other():
    weight = torch.tensor([0.4, 2.0], requires_grad=True)
    shown = straight_through(weight, weight.detach() * torch.tensor([0.0, 1.0]))
    (shown * torch.tensor([3.0, 5.0])).sum().backward()
    assert shown.tolist() == [0.0, 2.0] and weight.grad.tolist() == [3.0, 5.0]
