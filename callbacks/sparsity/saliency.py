"""What to keep: how much each weight matters. Pure functions; a larger score means kept. Shapes are the weight's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import derive_seed

SMALLEST = torch.finfo(torch.float32).tiny


def magnitude(weight: Tensor) -> Tensor:
    """|w| (arXiv 1506.02626)."""
    return weight.abs()


def gradient(grad: Tensor) -> Tensor:
    """|dL/dw|: how much a step on this weight would change the loss, also where the weight is 0 (arXiv 1911.11134)."""
    return grad.abs()


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """|w dL/dw|: the first-order change of the loss if the weight were 0 (arXiv 1906.10771; SNIP, 1810.02340)."""
    return (weight * grad).abs()


def movement(score: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """The score after a step: it rises while the weight moves away from 0 (arXiv 2005.07683, eq. 5; signed)."""
    return score - weight * grad


def wanda(weight: Tensor, input_norms: Tensor) -> Tensor:
    """|w_ij| ||x_j||: weight [out, in], norms of the layer's inputs over a calibration set [in] (arXiv 2306.11695)."""
    return weight.abs() * input_norms


def random(numel: int, seed: int, name: str, *moment: int) -> Tensor:
    """Uniform in [0, 1), [numel]: a function of seed, parameter and moment alone, so any rank can cut its slice."""
    draw = torch.Generator().manual_seed(derive_seed(seed, name, *moment))
    return torch.rand(numel, generator=draw)


def among(candidates: Tensor, score: Tensor) -> Tensor:
    """Scores >= 0 where `candidates`, and less than any of these elsewhere."""
    return torch.where(candidates, score.abs().clamp_min(SMALLEST), 0.0)
