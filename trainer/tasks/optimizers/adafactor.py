"""Adafactor: the second moment of a matrix as a row and a column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .groups import Named, decay_groups, decay_of, shape_of
from .wholes import MATRICES, Part, WholeStepping

TINY = torch.finfo(torch.float32).eps  # below which no mean square goes
SMALLEST = 1e-3  # the least that a parameter's size counts as
POWER = -0.8  # of the step count: how much a new gradient weighs


class Adafactor(WholeStepping):
    """Steps by the gradient's mean over its root mean square, which a matrix keeps as two vectors.

    What `torch.optim.Adafactor` computes, on shards as well: a matrix's gradient is gathered, one matrix at a time.

    Source: Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5, without momentum.

    Args:
        parameters: By name.
        settings: The recipe's optimizer section.
    """

    def __init__(self, parameters: Named, settings: Any) -> None:
        groups = decay_groups(parameters, decay_of(settings))
        super().__init__([{**group, MATRICES: _matrices(group)} for group in groups], {"lr": settings.lr})

    def update_part(self, part: Part, group: dict[str, Any]) -> None:
        """One step, of a length in proportion to the parameter's own size."""
        step, count = part.entries["step"], part.shape.numel()
        new, rate = step**POWER, min(group["lr"], step**-0.5)
        size = float(part.total(part.weight.square().sum())) ** 0.5 / count**0.5
        if len(part.shape) > 1:
            whole = part.whole(part.grad)
            if part.empty:
                return
            move = _factored(part, whole, new).mul_(whole)
            square = move.square().sum()
            move = part.cut(move)
        else:
            moment = part.elementwise("variance")
            moment.lerp_(part.grad.square(), new)
            move = moment.clamp(min=TINY * TINY).rsqrt_().mul_(part.grad)
            square = part.total(move.square().sum())
        length = max(1.0, float(square) ** 0.5 / count**0.5)
        part.weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        part.weight.add_(move, alpha=-rate * max(SMALLEST, size) / length)


def _matrices(group: dict[str, Any]) -> bool:
    return all(len(shape_of(p)) > 1 for p in group["params"])


def _factored(part: Part, grad: Tensor, new: float) -> Tensor:
    """1 over the root of the second moment, from its means over rows and columns."""
    row = part.of_whole("row_var", lambda: torch.zeros_like(grad[..., :1]))
    column = part.of_whole("col_var", lambda: torch.zeros_like(grad[..., :1, :]))
    row.lerp_(grad.norm(dim=-1, keepdim=True).square_().div_(grad.shape[-1]), new)
    column.lerp_(grad.norm(dim=-2, keepdim=True).square_().div_(grad.shape[-2]), new)
    moment = (row @ column).div_(row.mean(dim=-2, keepdim=True).clamp_(min=TINY))
    return moment.clamp_(min=TINY * TINY).rsqrt_()
