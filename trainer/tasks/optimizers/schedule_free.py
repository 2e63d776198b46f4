"""Schedule-free AdamW: an average of the weights in place of a falling learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stepping import CannotStep, Stepping


class ScheduleFreeAdamW(Stepping):
    """AdamW whose result is the average of its path, so that the rate need not fall and the end need not be known.

    Gradients are taken at y, which is what the parameters hold; z takes the steps; the result x is the average of all
    z, of which y = betas[0] x + (1 - betas[0]) z keeps a share. `AveragedPoint` puts x in place for validation and at
    the end; what is seen without it is y.

    Source: Defazio et al., arXiv 2405.15682, algorithm 1, with the weights lr² of the authors' code.

    Args:
        params: Parameters or groups.
        lr: The learning rate: constant after its warmup.
        betas: The share of x in y, above 0, and the decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Beside the gradient, at y.

    Raises:
        CannotStep: betas[0] is 0, and x could not be told from y and z.
    """

    def __init__(
        self, params: Any, lr: float = 2.5e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        if not 0 < betas[0] < 1:
            raise CannotStep(f"optimizer.betas: found {list(betas)}; schedule_free_adamw needs a first one above 0.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of z, and of y with it."""
        if not state:
            state.update(z=p.clone(), exp_avg_sq=torch.zeros_like(p), step=0.0, largest=0.0, weights=0.0)
        rate, (share, decay) = float(group["lr"]), group["betas"]
        state["step"] += 1.0
        state["largest"] = max(state["largest"], rate)
        weight = state["largest"] ** 2
        state["weights"] += weight
        new = weight / state["weights"] if state["weights"] else 0.0
        moment, z = state["exp_avg_sq"], state["z"]
        moment.mul_(decay).addcmul_(grad, grad, value=1.0 - decay)
        size = (moment / (1.0 - decay ** state["step"])).sqrt_().add_(group["eps"])
        move = torch.div(grad, size, out=size)
        if group["weight_decay"]:
            move.add_(p, alpha=group["weight_decay"])
        p.lerp_(z, new).add_(move, alpha=rate * (share * (1.0 - new) - 1.0))
        z.sub_(move, alpha=rate)
