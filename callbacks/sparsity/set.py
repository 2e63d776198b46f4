"""Sparse evolutionary training: connections move at random (arXiv 1707.04780)."""

from __future__ import annotations

from torch import Tensor

from ..contract import MIXING, Card
from ..parameters.shards import Shards
from .dynamic import DynamicSparse


class SET(DynamicSparse):
    """Train sparse; now and then drop the smallest weights and grow as many at random.

    Source: arXiv 1707.04780.

    Args:
        sparsity: Share of weights that are 0 from the first step to the last, in [0, 1).
        distribution: erk | uniform, or name patterns with each its own sparsity.
        drop_fraction: Share of connections that move at first; 0 leaves them where they are (static sparse training).
        every: Steps between updates.
        stop: Duration after which connections stay.
        rescale: Divide initial weights by the root of their layer's density, which keeps activations as large.
        start_from: Which connections there are at first: "random", or "magnitude" (for a model that is trained
            already).
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import SET
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[SET(sparsity=0.8, every=100)])
    """

    card = Card(
        name="set",
        does="trains sparse from the start; connections move at random",
        paper="1707.04780",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses=MIXING,
    )

    def growth(self, shards: Shards, name: str, step: int) -> Tensor:
        return self._random(shards, name, step)
