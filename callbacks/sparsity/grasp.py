"""GraSP: prune before training what does not carry the flow of gradients (arXiv 2002.07376)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..contract import MIXING, Card
from ..forward.isolated_step import loss_of
from .at_init import PruneAtInit, Weights, gradients_of


def hessian_times(loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """H v of `loss` with respect to `weights`, in their shapes: by a second pass through the first one's gradients."""
    gradients = gradients_of(loss, weights, create_graph=True)
    product = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    return gradients_of(product, weights)  # type: ignore[arg-type]


class GraSP(PruneAtInit):
    """Before training, keep the weights with the largest w (H g): without them the gradient's norm would fall most.

    The model must have second derivatives; attention runs as plain products while it looks. The training data must be
    there when the run is set up, and the model whole (not made under zero.Init).

    Source: arXiv 2002.07376.

    Args:
        sparsity: Share of weights that are 0 from the first step to the last, in [0, 1).
        samples: How many training samples to look at, drawn by the run's seed.
        distribution: global (all layers ranked together) | uniform | erk, or name patterns with each its own sparsity.
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import GraSP
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[GraSP(sparsity=0.8)])
    """

    card = Card(
        name="grasp",
        does="prunes before training what carries least of the gradient flow",
        paper="2002.07376",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses=MIXING,
    )

    def scores(self, module: pl.LightningModule, weights: Weights, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Gradient and Hessian are those of all samples together, however they are cut into batches."""
        tensors, share = list(weights.values()), 1 / len(batches)
        gradient = [torch.zeros_like(p) for p in tensors]
        for batch in batches:
            for total, part in zip(gradient, gradients_of(loss_of(module, batch), tensors), strict=True):
                total.add_(part, alpha=share)
        product = [torch.zeros_like(p) for p in tensors]
        for batch in batches:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                parts = hessian_times(loss_of(module, batch), tensors, gradient)
            for total, part in zip(product, parts, strict=True):
                total.add_(part, alpha=share)
        return {name: p.detach() * h for (name, p), h in zip(weights.items(), product, strict=True)}
