"""Weights that a model is evaluated with and ends with, other than those that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..parameters.accessor import shards_of
from ..parameters.shards import Shards


class OtherWeights(pl.Callback):
    """Puts other master weights in place for each validation, and for good when training ends.

    Each rank does so with its slices; there is no communication but the refresh of the copies that are made of them.
    """

    _raw: dict[str, Tensor] | None = None

    def has_other_weights(self) -> bool:
        """Whether there are any yet."""
        raise NotImplementedError

    def other_weights(self, shards: Shards, name: str) -> Tensor:
        """This rank's slice, [length], of what a parameter is to be."""
        raise NotImplementedError

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not self.has_other_weights():
            return
        shards = shards_of(trainer, pl_module)
        self._raw = {name: shards.master(name).clone() for name in shards.slices}
        self._install(shards)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._raw is None:
            return
        shards = shards_of(trainer, pl_module)
        for name, raw in self._raw.items():
            shards.master(name).copy_(raw)
        shards.publish()
        self._raw = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.has_other_weights():
            self._install(shards_of(trainer, pl_module))

    @torch.no_grad()
    def _install(self, shards: Shards) -> None:
        for name in shards.slices:
            shards.master(name).copy_(self.other_weights(shards, name))
        shards.publish()


@contextmanager
def evaluated_weights(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """The weights that an evaluation sees, for what is done with them after it. Collective."""
    others = [callback for callback in trainer.callbacks if isinstance(callback, OtherWeights)]  # type: ignore[attr-defined]
    for callback in others:
        callback.on_validation_start(trainer, module)
    try:
        yield
    finally:
        for callback in others:
            callback.on_validation_end(trainer, module)
