"""The averaged point of a schedule-free optimizer: what it is evaluated at and ends with."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..parameters.shards import Shards
from .other_weights import OtherWeights


def averaged_point(y: Tensor, z: Tensor, share: float) -> Tensor:
    """x of y = share x + (1 - share) z: the average, where gradients are taken at y and steps at z.

    Example:
        >>> averaged_point(torch.tensor([1.9]), torch.tensor([1.0]), share=0.9)
        tensor([2.])
    """
    return torch.lerp(y, z, 1.0 - 1.0 / share)


class AveragedPoint(OtherWeights):
    """Validates with, and leaves as the final model, the average that a schedule-free optimizer keeps as `z`.

    A run of a recipe has it where the optimizer's card says so.

    Source: Defazio et al., arXiv 2405.15682.

    Args:
        share: Of the average in what the parameters hold: the optimizer's betas[0].

    Example:
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[AveragedPoint(share=0.9)])
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stepping = True

    def has_other_weights(self) -> bool:
        return getattr(self, "_stepping", False)

    def other_weights(self, shards: Shards, name: str) -> Tensor:
        """The average; the weight itself where the optimizer has not stepped it."""
        master = shards.master(name)
        z = shards.state(name).get("z")
        return master if z is None else averaged_point(master, z, self.share)
