"""RigL: connections grow where the gradient is largest (arXiv 1911.11134)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Card
from ..parameters.shards import Shards
from . import saliency
from .dynamic import DynamicSparse


class RigL(DynamicSparse):
    """Train sparse; now and then drop the smallest weights and grow as many where |dL/dw| is largest.

    Settings: see `DynamicSparse`.
    """

    card = Card(
        name="rigl",
        does="trains sparse from the start; connections grow where the gradient is largest",
        paper="1911.11134",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses={"muon"},
    )

    def growth(self, shards: Shards, name: str, step: int) -> Tensor:
        gradient = shards.gradient(name)
        if gradient is None:
            return torch.zeros_like(shards.master(name))
        return saliency.gradient(gradient).to(shards.master(name).device)
