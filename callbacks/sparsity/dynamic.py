"""Sparse from the start to the end, with connections that move: what SET and RigL share.

Every `every` steps until `stop`, each layer drops the weakest of its connections and grows as many new ones. These
start at 0 with fresh moments. How many: a cosine from `drop_fraction` to 0. The gradients of pruned weights are looked
at in those steps alone, and there they are the true dense ones of the global batch, however they are sharded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..accounting.clock import Duration, clock_of
from ..contract import Effect, IncompatibleTechniques, Workload, derive_seed, require
from ..parameters.accessor import shards_of
from ..parameters.shards import Shards
from . import distributions, saliency, schedules
from .masks import Masking, require_distribution, select_counts, shapes_of


@dataclass(kw_only=True, eq=False, repr=False)
class DynamicSparse(Masking):
    """Base of SET and RigL, which differ in `growth` alone. What the settings mean stands there."""

    sparsity: float = 0.9
    distribution: str | Mapping[str, float] = "erk"
    drop_fraction: float = 0.3
    every: int = 100
    stop: str = "75%"
    rescale: bool = True
    start_from: str = "random"
    skip: Sequence[str] = ()

    def check(self) -> None:
        super().check()
        require_distribution(self, self.distribution, ("uniform", "erk"))
        require(0 <= self.drop_fraction <= 1, self, "drop_fraction", "a share in [0, 1]")
        require(self.every > 0, self, "every", "a positive number of steps")
        require(self.start_from in ("random", "magnitude"), self, "start_from", "random | magnitude")
        Duration.parse(self.stop)

    def predict(self, workload: Workload) -> Effect:
        return Effect(flops=(1 - self.sparsity), realised=False)

    @classmethod
    def example(cls) -> Self:
        return cls(sparsity=0.6, drop_fraction=0.5, every=3)

    def growth(self, shards: Shards, name: str, step: int) -> Tensor:
        """Scores of connections that may grow, [length]."""
        raise NotImplementedError

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._stop = Duration.parse(self.stop)

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.active():
            return
        self._seed = derive_seed(getattr(trainer, "seed", 0), self.card.name)
        if self.mask_version:
            return
        if trainer.global_step:
            raise IncompatibleTechniques(
                f"{self.card.name}: the checkpoint has no masks; start a new run, or resume without this technique"
            )
        self._begin(shards_of(trainer, pl_module))

    def _begin(self, shards: Shards) -> None:
        shapes = shapes_of(shards, self._names)
        shares = distributions.densities(self.distribution, shapes, self.sparsity)
        scores = {name: self._first(shards, name) for name in self._names}
        self.apply_masks(shards, select_counts(shards, scores, distributions.keep(shares, shapes)))
        for name, density in self.densities().items() if self.rescale else ():
            shards.master(name).div_(density**0.5)
        shards.publish()

    def _first(self, shards: Shards, name: str) -> Tensor:
        weight = shards.master(name)
        return self._random(shards, name, 0) if self.start_from == "random" else saliency.magnitude(weight)

    def _random(self, shards: Shards, name: str, step: int) -> Tensor:
        where = shards.slices[name]
        return where.cut(saliency.random(where.numel, self._seed, name, step)).to(shards.master(name).device)

    def update_masks(self, trainer: pl.Trainer, shards: Shards) -> dict[str, Tensor] | None:
        step = trainer.global_step
        ended = clock_of(trainer).toward(self._stop)
        fraction = schedules.cosine_decay(ended, self.drop_fraction)
        if step == 0 or step % self.every or ended >= 1.0 or fraction == 0:
            return None
        return self._move(shards, fraction, step)

    def _move(self, shards: Shards, fraction: float, step: int) -> dict[str, Tensor]:
        """Drop the smallest `fraction` of each layer's weights, and grow as many. A weight just dropped may regrow."""
        sizes = {name: shards.slices[name].numel for name in self._names}
        active = {name: round(self._kept[name] * sizes[name]) for name in self._names}
        moved = {name: min(int(fraction * active[name]), sizes[name] - active[name]) for name in self._names}
        magnitudes = {name: self.among_kept(name, shards.master(name)) for name in self._names}
        kept = select_counts(shards, magnitudes, {name: active[name] - moved[name] for name in self._names})
        scores = {name: saliency.among(~kept[name], self.growth(shards, name, step)) for name in self._names}
        grown = select_counts(shards, scores, moved)
        return {name: kept[name] | grown[name] for name in self._names}
