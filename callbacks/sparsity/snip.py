"""SNIP: prune before training what would change the loss least (arXiv 1810.02340)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..contract import MIXING, Card
from ..forward.isolated_step import loss_of
from . import saliency
from .at_init import PruneAtInit, Weights, gradients_of


class SNIP(PruneAtInit):
    """Before training, keep the weights with the largest |w dL/dw|: without them the loss would change most.

    The training data must be there when the run is set up, and the model whole (not made under zero.Init).

    Source: arXiv 1810.02340.

    Args:
        sparsity: Share of weights that are 0 from the first step to the last, in [0, 1).
        samples: How many training samples to look at, drawn by the run's seed.
        distribution: global (all layers ranked together) | uniform | erk, or name patterns with each its own sparsity.
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import SNIP
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[SNIP(sparsity=0.9, samples=256)])
    """

    card = Card(
        name="snip",
        does="prunes before training what would change the loss least",
        paper="1810.02340",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses=MIXING,
    )

    def scores(self, module: pl.LightningModule, weights: Weights, batches: Sequence[Any]) -> dict[str, Tensor]:
        sums = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in weights.items()
        }
        for batch in batches:
            gradients = gradients_of(loss_of(module, batch), list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += gradient
        return {name: saliency.taylor(weights[name].detach(), sums[name]) for name in weights}
