"""Sparse evolutionary training: connections move at random (arXiv 1707.04780)."""

from __future__ import annotations

from torch import Tensor

from ..contract import Card
from ..parameters.shards import Shards
from .dynamic import DynamicSparse


class SET(DynamicSparse):
    """Train sparse; now and then drop the smallest weights and grow as many at random.

    Settings: see `DynamicSparse`.
    """

    card = Card(
        name="set",
        does="trains sparse from the start; connections move at random",
        paper="1707.04780",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses={"muon"},
    )

    def growth(self, shards: Shards, name: str, step: int) -> Tensor:
        return self._random(shards, name, step)
