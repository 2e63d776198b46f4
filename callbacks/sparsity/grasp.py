"""GraSP: prune before training what does not carry the flow of gradients (arXiv 2002.07376)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..aside import loss_of
from ..contract import Card
from .at_init import PruneAtInit, Weights


def hessian_times_gradient(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """H g of `loss` with respect to `weights`, in their shapes: by a second pass through the first one's gradients."""
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    product = sum((g * g.detach()).sum() for g in gradients)
    found = torch.autograd.grad(product, weights, allow_unused=True)  # type: ignore[arg-type]
    return [torch.zeros_like(w) if h is None else h for w, h in zip(weights, found, strict=True)]


class GraSP(PruneAtInit):
    """Before training, keep the weights with the largest w (H g): without them the gradient's norm would fall most.

    The model must have second derivatives; attention runs as plain products while it looks. Settings: see
    `PruneAtInit`.
    """

    card = Card(
        name="grasp",
        does="prunes before training what carries least of the gradient flow",
        paper="2002.07376",
        saves=frozenset({"size"}),
        writes=frozenset({"weights", "gradients", "optimizer"}),
        refuses=frozenset({"muon"}),
    )

    def scores(self, module: pl.LightningModule, weights: Weights, batches: Sequence[Any]) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(p) for name, p in weights.items()}
        for batch in batches:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                found = hessian_times_gradient(loss_of(module, batch), list(weights.values()))
            for name, product in zip(weights, found, strict=True):
                sums[name] += product
        return {name: weights[name].detach() * sums[name] for name in weights}
