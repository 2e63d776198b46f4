"""Muon for hidden matrices, with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from .groups import Named, decay_of, shape_of
from .of_torch import adamw
from .wholes import MATRICES, Part, WholeStepping

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of a Newton-Schulz step, steepest at 0


class MuonWithAdamW(WholeStepping):
    """Muon for the hidden weight matrices, AdamW for embeddings, the output layer and everything not 2-D, as one.

    The momentum is split among ranks as weights are. Under ZeRO its direction is gathered, one matrix at a time, and
    made orthogonal by each rank that has a part of the matrix: under ZeRO-1 and ZeRO-2 mostly one.

    Source: Jordan et al., Muon (2024), and Liu et al., arXiv 2502.16982, whose scaling lets both share one learning
    rate.

    Args:
        parameters: By name.
        settings: The recipe's optimizer section.

    Raises:
        CannotStep: In its step, where another strategy than ours has cut the matrices.
    """

    def __init__(self, parameters: Named, settings: Any) -> None:
        matrices = [p for n, p in parameters if _is_hidden_matrix(n, p)]
        others = [(n, p) for n, p in parameters if not _is_hidden_matrix(n, p)]
        groups: list[dict[str, Any]] = []
        if matrices:
            momentum, decay = settings.momentum or 0.95, decay_of(settings)
            groups.append({"params": matrices, "momentum": momentum, "weight_decay": decay, MATRICES: True})
        self._adamw = adamw(others, settings) if others else None
        super().__init__([*groups, *(self._adamw.param_groups if self._adamw else ())], {"lr": settings.lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts."""
        loss = None
        if closure is not None:  # it sets gradients to zero, of all groups
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if group.get(MATRICES)]
        try:
            super().step()
        finally:
            self.param_groups = groups
        others = [group for group in groups if not group.get(MATRICES)]
        if self._adamw is not None and others:
            self._adamw.state, self._adamw.param_groups = self.state, others
            self._adamw.step()
        return loss

    def by_slices(self, group: dict[str, Any]) -> bool:
        """Those of matrices; AdamW's share are DTensors."""
        return self.steps_slices and bool(group.get(MATRICES))

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


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    outer = ("embed", "wte", "wpe", "lm_head", "classifier", "score")
    return len(shape_of(parameter)) == 2 and not any(word in name for word in outer)
