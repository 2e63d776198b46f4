"""The last accumulation window of an epoch, where the epoch ends before the window is full.

Its gradient is the mean over the micro-batches that it has, as in every other window. Lightning divides each loss by
the number of a full window, and DeepSpeed, which counts micro-batches itself, would let the rest flow into the next
epoch.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from ...callbacks.parameters.accessor import shards_of


class CutWindow:
    """In force from before the window's last micro-batch until `end`.

    Args:
        trainer, module: of the run.
        size: micro-batches in this window.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, size: int) -> None:
        self.trainer, self.module = trainer, module
        self.scale = trainer.accumulate_grad_batches / size
        self._missing = trainer.accumulate_grad_batches - size
        strategy: Any = trainer.strategy
        self._backward = strategy.backward
        strategy.backward = self._scaled
        self._engine = getattr(strategy, "deepspeed_engine", None)
        if self._engine is not None:
            strategy.cuts_window = True
            self._engine.set_gradient_accumulation_boundary(True)

    def _scaled(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._backward(*args, **kwargs)
        shards = shards_of(self.trainer, self.module)
        for name in shards.slices:
            gradient = shards.gradient(name)
            if gradient is not None:
                shards.set_gradient(name, gradient * self.scale)
        return loss

    def end(self) -> None:
        """The optimizer has stepped: the next window is a whole one."""
        strategy: Any = self.trainer.strategy
        del strategy.backward
        if self._engine is not None:
            strategy.cuts_window = False
            self._engine._is_gradient_accumulation_boundary = None
            self._engine.micro_steps += self._missing
