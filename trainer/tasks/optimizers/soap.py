"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners, for hidden matrices; AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cards import LARGEST_SIDE
from .groups import Named
from .hidden import HiddenMatrices
from .wholes import Part

EVERY = 10  # steps from one basis to the next


class SOAP(HiddenMatrices):
    """Adam on gradients that are turned into the slowly moving eigenbasis of G Gᵀ and Gᵀ G.

    A basis follows by a power iteration and a QR decomposition every 10 steps. The first step finds it, and moves
    nothing. Moments are split among ranks as weights are; products and bases are kept by each rank that has a part of
    the matrix. Under ZeRO gradient and moments are gathered, one matrix at a time.

    Source: Vyas et al., arXiv 2409.11321, algorithms 3 and 4; the authors' code skips the first step, too.

    Args:
        parameters: By name.
        settings: The recipe's optimizer section.
    """

    largest_side = LARGEST_SIDE

    def __init__(self, parameters: Named, settings: Any) -> None:
        super().__init__(parameters, settings, betas=tuple(settings.betas), eps=settings.eps)

    def update_part(self, part: Part, group: dict[str, Any]) -> None:
        """Adam's step in the bases there are, and then better ones."""
        keep, keep_square = group["betas"]
        mean, square = part.elementwise("exp_avg"), part.elementwise("exp_avg_sq")
        steps = part.entries["step"] - 1.0
        if steps:
            mean.lerp_(part.grad, 1.0 - keep)
        grad, average, moment = part.whole(part.grad), part.whole(mean), part.whole(square)
        if part.empty:
            return
        names = ("left", "right")
        bases = [
            _basis(part, name, side) if side <= self.largest_side else None
            for name, side in zip(names, part.shape, strict=True)
        ]
        if steps:
            turned = _turned(grad, *bases)
            moment.mul_(keep_square).addcmul_(turned, turned, value=1.0 - keep_square)
            square.copy_(part.cut(moment))
            size = torch.div(moment, 1.0 - keep_square**steps, out=turned).sqrt_().add_(group["eps"])
            move = _back(_turned(average, *bases).div_(size), *bases)
            del turned, size
            part.weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            part.weight.add_(part.cut(move), alpha=-group["lr"] / (1.0 - keep**steps))
            del move
        for name, basis, other in zip(names, bases, (grad, grad.T), strict=True):
            if basis is None:
                continue
            products = part.of_whole(f"{name}_products", lambda basis=basis: torch.zeros_like(basis))  # type: ignore[misc]
            products.mul_(keep_square).addmm_(other, other.T, alpha=1.0 - keep_square)
            if not steps:
                basis.copy_(torch.linalg.eigh(products).eigenvectors)
            elif steps % EVERY == 0:
                basis.copy_(torch.linalg.qr(products @ basis).Q)


def _basis(part: Part, name: str, side: int) -> Tensor:
    """The orthonormal columns [side, side] of one side of a matrix."""
    return part.of_whole(f"{name}_basis", lambda: part.weight.new_zeros(side, side))


def _turned(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    matrix = matrix.clone() if left is None else left.T @ matrix
    return matrix if right is None else matrix @ right


def _back(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    matrix = matrix if left is None else left @ matrix
    return matrix if right is None else matrix @ right.T
