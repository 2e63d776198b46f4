"""Muon for hidden matrices, with AdamW for the rest."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .groups import Named
from .hidden import HiddenMatrices
from .wholes import Part

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of a Newton-Schulz step, steepest at 0


class MuonWithAdamW(HiddenMatrices):
    """Muon for the hidden weight matrices, AdamW for embeddings, the output layer and everything not 2-D, as one.

    The momentum is split among ranks as weights are. Under ZeRO its direction is gathered, one matrix at a time, and
    made orthogonal by each rank that has a part of the matrix: under ZeRO-1 and ZeRO-2 mostly one.

    Source: Jordan et al., Muon (2024), and Liu et al., arXiv 2502.16982, whose scaling lets both share one learning
    rate.

    Args:
        parameters: By name.
        settings: The recipe's optimizer section.
    """

    def __init__(self, parameters: Named, settings: Any) -> None:
        super().__init__(parameters, settings, momentum=settings.momentum or 0.95)

    def update_part(self, part: Part, group: dict[str, Any]) -> None:
        """Momentum, its Nesterov direction made orthogonal, and a step as long as AdamW's would be."""
        average, keep, rate = part.elementwise("momentum_buffer"), group["momentum"], group["lr"]
        average.lerp_(part.grad, 1.0 - keep)
        direction = part.whole(torch.lerp(part.grad, average, keep))
        if part.empty:
            return
        part.weight.mul_(1.0 - rate * group["weight_decay"])
        move = part.cut(orthogonal(direction.to(part.device))).to(part.weight.device, part.weight.dtype)
        part.weight.add_(move, alpha=-rate * 0.2 * sqrt(max(part.shape)))


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix [n, m] with all singular values near 1: between 0.7 and 1.2.

    Computed in bfloat16 on CUDA, as the paper does, and in float32 on CPUs, where that is as fast.
    """
    a, b, c = QUINTIC
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if len(matrix) > matrix.shape[1] else x
