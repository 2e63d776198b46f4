"""RigL: connections grow where the gradient is largest (arXiv 1911.11134)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import MIXING, Card
from ..parameters.shards import Shards
from . import saliency
from .dynamic import DynamicSparse


class RigL(DynamicSparse):
    """Train sparse; now and then drop the smallest weights and grow as many where |dL/dw| is largest.

    With small batches `every` should be larger: a grown weight needs time to grow (arXiv 2102.02887).

    Source: arXiv 1911.11134.

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
        >>> from shoestring.callbacks import RigL
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[RigL(sparsity=0.9, every=100)])
    """

    card = Card(
        name="rigl",
        does="trains sparse from the start; connections grow where the gradient is largest",
        paper="1911.11134",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses=MIXING,
    )

    def growth(self, shards: Shards, name: str, step: int) -> Tensor:
        gradient = shards.gradient(name)
        if gradient is None:
            return torch.zeros_like(shards.master(name))
        return saliency.gradient(gradient).to(shards.master(name).device)
