"""Lion: the sign of a momentum, at half of AdamW's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stepping import Stepping


class Lion(Stepping):
    """Every weight moves by the learning rate, in the direction of an average of gradients.

    It wants a rate 3 to 10 times smaller than AdamW's and a weight decay as much larger, so that their product stays.

    Source: Chen et al., arXiv 2302.06675, algorithm 2.

    Args:
        params: Parameters or groups.
        lr: The learning rate.
        betas: Of the average that gives the direction, and of the one that is kept.
        weight_decay: Beside the gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> weight.grad = torch.tensor([0.001, -5.0])
        >>> Lion([weight], lr=0.25).step()
        >>> weight.tolist()
        [0.75, 1.25]
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step: decay, the sign of the first average, and then the second average."""
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        average, (now, later) = state["exp_avg"], group["betas"]
        p.mul_(1.0 - group["lr"] * group["weight_decay"])
        p.add_(torch.lerp(average, grad, 1.0 - now).sign_(), alpha=-group["lr"])
        average.lerp_(grad, 1.0 - later)
