"""Top-KAST: compute with the largest weights, learn a somewhat larger set (arXiv 2106.03517)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import pytorch_lightning as pl
from torch import Tensor

from ..contract import Card, Effect, Workload, require
from ..parameters.shards import Shards
from . import saliency
from .masks import require_distribution, select
from .soft_masks import SoftMasking


@dataclass(kw_only=True, eq=False, repr=False)
class TopKAST(SoftMasking):
    """Compute with the largest weights A; gradients reach the larger set B, from which A is chosen anew.

    Source: arXiv 2106.03517.

    Args:
        sparsity: Share of weights outside A, in [0, 1).
        backward_sparsity: Share of weights outside B, at most `sparsity`.
        penalty: L2 on A, and 1 / (1 - sparsity) times as much on B outside A, so that only what grows enters A.
        every: Steps between choices.
        distribution: uniform | erk | global, or name patterns with each its own sparsity.
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import TopKAST
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[TopKAST(sparsity=0.9, backward_sparsity=0.8)])
    """

    card = Card(
        name="top_kast",
        does="computes with the largest weights and learns a somewhat larger set of them",
        paper="2106.03517",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses={"schedule_free_adamw"},  # zero is no place for its second copy of a weight
    )

    sparsity: float = 0.8
    backward_sparsity: float = 0.5
    penalty: float = 1e-4
    every: int = 10
    distribution: str | Mapping[str, float] = "uniform"
    skip: Sequence[str] = ()

    def check(self) -> None:
        super().check()
        legal = self.sparsity == 0 or 0 <= self.backward_sparsity <= self.sparsity
        require(legal, self, "backward_sparsity", f"a share in [0, sparsity={self.sparsity:g}]")
        require(self.penalty >= 0, self, "penalty", "a number that is not negative")
        require(self.every > 0, self, "every", "a positive number of steps")
        require_distribution(self, self.distribution, ("uniform", "erk", "global"))

    def predict(self, workload: Workload) -> Effect:
        return Effect(flops=1 - (2 * self.sparsity + self.backward_sparsity) / 3, realised=False)

    @classmethod
    def example(cls) -> Self:
        return cls(sparsity=0.6, backward_sparsity=0.3, every=3)

    def begin(self, shards: Shards) -> None:
        self.apply_masks(shards, self._choose(shards))

    def update_masks(self, trainer: pl.Trainer, shards: Shards) -> dict[str, Tensor] | None:
        if trainer.global_step == 0 or trainer.global_step % self.every:
            return None
        chosen = self._choose(shards)
        for name, mask in self._local["backward"].items():
            for state in shards.state(name).values():
                state.mul_(mask)  # momentum would go on moving what has left B
        return chosen

    def _choose(self, shards: Shards) -> dict[str, Tensor]:
        scores = {name: saliency.magnitude(shards.master(name)) for name in self._names}
        forward = select(shards, scores, self.distribution, self.sparsity)
        wider = self.distribution if isinstance(self.distribution, str) else "uniform"
        backward = select(shards, scores, wider, self.backward_sparsity)
        self._local["backward"] = {name: mask | forward[name] for name, mask in backward.items()}
        return forward

    def mask_dense_gradients(self, trainer: pl.Trainer, shards: Shards) -> None:
        outside = self.penalty / (1.0 - self.sparsity)
        for name, backward in self._local["backward"].items():
            if backward.numel() == 0 or (gradient := shards.gradient(name)) is None:
                continue
            forward, weight = self._local["forward"][name], shards.master(name)
            pull = weight * (self.penalty * forward + outside * (backward & ~forward))
            shards.set_gradient(name, (gradient + pull.to(gradient.device)) * backward.to(gradient.device))
