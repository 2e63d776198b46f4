"""SNIP: prune before training what would change the loss least (arXiv 1810.02340)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..contract import Card
from ..forward.aside import loss_of
from . import saliency
from .at_init import PruneAtInit, Weights, gradients_of


class SNIP(PruneAtInit):
    """Before training, keep the weights with the largest |w dL/dw|: without them the loss would change most.

    Settings: see `PruneAtInit`.
    """

    card = Card(
        name="snip",
        does="prunes before training what would change the loss least",
        paper="1810.02340",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses={"muon"},
    )

    def scores(self, module: pl.LightningModule, weights: Weights, batches: Sequence[Any]) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(p) for name, p in weights.items()}
        for batch in batches:
            found = gradients_of(loss_of(module, batch), list(weights.values()))
            for name, gradient in zip(weights, found, strict=True):
                sums[name] += gradient
        return {name: saliency.taylor(weights[name].detach(), sums[name]) for name in weights}
