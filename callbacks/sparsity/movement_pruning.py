"""Movement pruning: keep the weights that move away from zero (arXiv 2005.07683)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..accounting.clock import clock_of
from ..contract import Card, Effect, Workload
from ..parameters.shards import Shards
from . import saliency
from .masks import mask_gradients, require_distribution, select
from .schedules import Ramp, cubic
from .soft_masks import SoftMasking


@dataclass(kw_only=True, eq=False, repr=False)
class MovementPruning(SoftMasking):
    """Compute with the weights that fine-tuning moves away from zero: those of the largest sum of -w dL/dw.

    Sparsity follows the cubic schedule from `start` to `end`. A pruned weight keeps its value and its score goes on, so
    it may come back. Weights learn where they are used, scores everywhere.

    Source: arXiv 2005.07683.

    Args:
        sparsity: Share of weights that are 0 in the end, in [0, 1).
        start: Duration after which pruning begins.
        end: Duration after which `sparsity` is reached.
        every: Steps between choices.
        distribution: uniform | erk | global, or name patterns with each its own sparsity.
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import MovementPruning
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[MovementPruning(sparsity=0.85, skip=["*embeddings*"])])
    """

    card = Card(
        name="movement_pruning",
        does="keeps the weights that fine-tuning moves away from zero",
        paper="2005.07683",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
    )

    sparsity: float = 0.8
    start: str = "10%"
    end: str = "70%"
    every: int = 10
    distribution: str | Mapping[str, float] = "global"
    skip: Sequence[str] = ()

    def check(self) -> None:
        super().check()
        self._read_ramp()
        require_distribution(self, self.distribution, ("uniform", "erk", "global"))

    def predict(self, workload: Workload) -> Effect:
        return Effect(flops=1 - 0.6 * self.sparsity, realised=False)

    @classmethod
    def example(cls) -> Self:
        return cls(sparsity=0.6, start="10%", end="70%", every=2)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._ramp = self._read_ramp()

    def _read_ramp(self) -> Ramp:
        return Ramp.of(self, self.start, self.end, self.every)

    def update_masks(self, trainer: pl.Trainer, shards: Shards) -> dict[str, Tensor] | None:
        self._score(shards)
        target = self._ramp.sparsity(clock_of(trainer), self.sparsity, cubic)
        if trainer.global_step % self.every:
            return None
        return select(shards, self._local["score"], self.distribution, target) if target > 0 else None

    def _score(self, shards: Shards) -> None:
        scores = self._local.setdefault("score", {})
        for name in self._names:
            weight, gradient = shards.master(name), shards.gradient(name)
            precise = torch.promote_types(weight.dtype, torch.float32)  # a long sum of small numbers
            before = scores[name].to(precise) if name in scores else torch.zeros_like(weight, dtype=precise)
            if gradient is not None:
                before = saliency.movement(before, weight.to(precise), gradient.to(weight.device, precise))
            scores[name] = before

    def mask_dense_gradients(self, trainer: pl.Trainer, shards: Shards) -> None:
        mask_gradients(shards, self._local.get("forward", {}))
