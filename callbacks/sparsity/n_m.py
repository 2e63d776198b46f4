"""N:M sparsity: at most N of every M neighbouring weights are used (SR-STE, arXiv 2102.04010)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pytorch_lightning as pl
from torch import Tensor

from ..contract import Card, Effect, Workload, require
from ..forward.forward_weights import straight_through
from ..parameters.accessor import shards_of
from ..parameters.shards import Shards
from . import patterns
from .soft_masks import SoftMasking


@dataclass(kw_only=True, eq=False, repr=False)
class NM(SoftMasking):
    """Compute with the `n` largest of every `m` neighbouring weights in a row; all are learned, straight through.

    2:4 is what sparse tensor cores run; elsewhere the saving in FLOPs is counted, not realised. A row whose length is
    no multiple of `m` ends in a shorter group.

    Source: arXiv 2102.04010.

    Args:
        n: How many neighbours are used; `n` = `m` is off.
        m: How many neighbours make a group.
        decay: Pulls the unused weights toward 0 (the sparse-refined term), so that masks settle.
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> import torch
        >>> from shoestring.callbacks import NM
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[NM(n=2, m=4)])
        >>> patterns.n_m(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), n=2, m=4)  # the mask of a row
        tensor([[ True, False, False,  True]])
    """

    card = Card(
        name="n_m",
        does="uses at most N of every M neighbouring weights, 2 of 4 as tensor cores want them",
        paper="2102.04010",
        saves={"size"},
        writes={"weights", "gradients"},
    )

    n: int = 2
    m: int = 4
    decay: float = 2e-4
    skip: Sequence[str] = ()

    def check(self) -> None:
        require(self.m >= 1, self, "m", "a positive number of neighbours")
        require(1 <= self.n <= self.m, self, "n", f"a number from 1 to m={self.m}")
        require(self.decay >= 0, self, "decay", "a number that is not negative")

    def predict(self, workload: Workload) -> Effect:
        return Effect(flops=(2 * self.n / self.m + 1) / 3, realised=False)

    @classmethod
    def noop(cls) -> Self:
        return cls(n=4, m=4)

    def active(self) -> bool:
        return self.n < self.m

    def begin(self, shards: Shards) -> None:
        self._kept = dict.fromkeys(self._names, self.n / self.m)

    def seen(self, name: str, weight: Tensor) -> Tensor:
        self._whole[name] = mask = patterns.n_m(weight.detach().abs(), self.n, self.m)
        return straight_through(weight, weight.detach() * mask)

    def update_masks(self, trainer: pl.Trainer, shards: Shards) -> None:
        return None

    def mask_dense_gradients(self, trainer: pl.Trainer, shards: Shards) -> None:
        """g + decay * (1 - mask) * w, arXiv 2102.04010 eq. 8; the mask is the last forward's."""
        for name in self._names if self.decay else ():
            if shards.slices[name].length == 0 or (gradient := shards.gradient(name)) is None:
                continue
            unused = ~shards.slices[name].cut(self._whole[name])
            pull = self.decay * unused.to(gradient.device) * shards.master(name).to(gradient.device)
            shards.set_gradient(name, gradient + pull)

    def final_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        if not self.active():
            return {}
        shards = shards_of(trainer, pl_module)
        whole = {name: patterns.n_m(shards.whole(name).abs(), self.n, self.m) for name in self._names}
        return {name: shards.slices[name].cut(mask).to(shards.master(name).device) for name, mask in whole.items()}
