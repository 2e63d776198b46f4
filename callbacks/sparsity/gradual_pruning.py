"""Gradual magnitude pruning: the smallest weights go first, along a cubic schedule (arXiv 1710.01878)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..accounting.clock import clock_of
from ..contract import MIXING, BadSetting, Card, Effect, Workload, require
from ..parameters.shards import Shards
from . import distributions, patterns, saliency, schedules
from .masks import Masking, require_distribution, select, select_blocks, shapes_of

CRITERIA = ("magnitude", "taylor", "gradient")
RAMPS = {"cubic": schedules.cubic, "one_shot": schedules.one_shot}


@dataclass(kw_only=True, eq=False, repr=False)
class GradualPruning(Masking):
    """Raise the sparsity of linear and convolution weights from 0 to `sparsity` between `start` and `end`.

    What is pruned stays pruned. A masked dense weight runs at full cost: the saving in FLOPs is counted, not realised.

    Source: arXiv 1710.01878.

    Args:
        sparsity: Share of weights that are 0 in the end, in [0, 1).
        start: Duration after which pruning begins.
        end: Duration after which `sparsity` is reached.
        every: Steps between prunings.
        ramp: "cubic", or "one_shot": all of it at `end`.
        criterion: What is kept: the largest "magnitude" |w|, "taylor" |w dL/dw| or "gradient" |dL/dw| of one global
            batch.
        distribution: uniform | erk | global (all layers ranked together), or name patterns with each its own sparsity.
        pattern: "unstructured", or blocks such as "4x4", "1x16", "1x*" (whole output neurons).
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import GradualPruning
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[GradualPruning(sparsity=0.8, skip=["head.*"])])
        >>> round(schedules.cubic(0.5, 0.8), 3)  # sparsity half-way between `start` and `end`
        0.7
    """

    card = Card(
        name="gradual_pruning",
        does="prunes the smallest weights along a cubic schedule",
        paper="1710.01878",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses=MIXING,  # its update mixes elements: zeros would not stay
    )

    sparsity: float = 0.5
    start: str = "10%"
    end: str = "70%"
    every: int = 10
    ramp: str = "cubic"
    criterion: str = "magnitude"
    distribution: str | Mapping[str, float] = "uniform"
    pattern: str = "unstructured"
    skip: Sequence[str] = ()

    def check(self) -> None:
        super().check()
        self._read_ramp()
        require(self.ramp in RAMPS, self, "ramp", " | ".join(RAMPS))
        require(self.criterion in CRITERIA, self, "criterion", " | ".join(CRITERIA))
        try:
            block = patterns.block_of(self.pattern)
        except ValueError:
            allowed = 'unstructured, or ROWSxCOLUMNS of a block, "*" for all'
            raise BadSetting(self.card.name, "pattern", self.pattern, allowed) from None
        names = distributions.NAMES if block is None else ("uniform", "erk")
        require_distribution(self, self.distribution, names)

    def predict(self, workload: Workload) -> Effect:
        return Effect(flops=1 - 0.6 * self.sparsity, realised=False)

    @classmethod
    def example(cls) -> Self:
        return cls(sparsity=0.6, start="0%", end="70%", every=2)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._ramp = self._read_ramp()

    def _read_ramp(self) -> schedules.Ramp:
        return schedules.Ramp.of(self, self.start, self.end, self.every)

    def update_masks(self, trainer: pl.Trainer, shards: Shards) -> dict[str, Tensor] | None:
        target = self._ramp.sparsity(clock_of(trainer), self.sparsity, RAMPS[self.ramp])
        if target <= 0 or (self.mask_version and trainer.global_step % self.every):
            return None
        scores = {name: self._score(shards, name) for name in self._names}
        if (block := patterns.block_of(self.pattern)) is None:
            return select(shards, scores, self.distribution, target)
        shares = distributions.densities(self.distribution, shapes_of(shards, self._names), target)
        return select_blocks(shards, scores, block, shares)

    def _score(self, shards: Shards, name: str) -> Tensor:
        weight, gradient = shards.master(name), shards.gradient(name)
        if self.criterion == "magnitude":
            return self.among_kept(name, weight)
        gradient = torch.zeros_like(weight) if gradient is None else gradient.to(weight.dtype)
        scored = saliency.taylor(weight, gradient) if self.criterion == "taylor" else saliency.gradient(gradient)
        return self.among_kept(name, scored)
