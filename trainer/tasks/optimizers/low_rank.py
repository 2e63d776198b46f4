"""GaLore and APOLLO: Adam's moments of a projection of a gradient, for hidden matrices; AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .groups import Named
from .hidden import HiddenMatrices
from .wholes import Part

EVERY = 200  # steps from one projection to the next
SHARE = 4  # the rank is the shorter side over this one
SCALE = 0.25  # of GaLore's steps
GROWTH = 1.01  # of APOLLO's: no step is longer than the last one by more


class LowRank(HiddenMatrices):
    """Adam's moments of `projection` [rank, n] of a gradient [m, n], m <= n, which each rank with a part of it keeps.

    The rank is a quarter of the shorter side, and the projection is made anew every 200 steps, as in both papers.
    Under ZeRO the gradient is gathered, one matrix at a time.

    Args:
        parameters: By name.
        settings: The recipe's optimizer section.
    """

    share = SHARE

    def __init__(self, parameters: Named, settings: Any) -> None:
        super().__init__(parameters, settings, betas=tuple(settings.betas), eps=settings.eps)

    def update_part(self, part: Part, group: dict[str, Any]) -> None:
        """Decay, and a step of the whole matrix."""
        whole = part.whole(part.grad)
        if part.empty:
            return
        tall = part.shape[0] > part.shape[1]
        move = self.move(part, whole.T if tall else whole, group)
        part.weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        part.weight.add_(part.cut(move.T if tall else move), alpha=-group["lr"])

    def move(self, part: Part, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """What is subtracted of a matrix, over the learning rate: from its gradient [m, n], m <= n."""
        raise NotImplementedError

    def rank(self, grad: Tensor) -> int:
        """Of the projection."""
        return max(1, len(grad) // self.share)


class GaLore(LowRank):
    """AdamW within the space of a gradient's first singular vectors.

    Source: Zhao et al., arXiv 2403.03507, algorithms 1 and 2, with the scale 0.25.
    """

    def move(self, part: Part, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's step of the projection, projected back."""
        basis = part.of_whole("basis", lambda: grad.new_zeros(len(grad), self.rank(grad)))
        if (part.entries["step"] - 1) % EVERY == 0:
            basis.copy_(torch.linalg.svd(grad.float(), full_matrices=False).U[:, : self.rank(grad)])
        return basis @ _adam(part, basis.T @ grad, group).mul_(SCALE)


class APOLLO(LowRank):
    """The gradient itself, each channel as long as AdamW would make it in a random projection.

    The projection is drawn again for every step from the number of those before it, and so takes no memory.

    Source: Zhu et al., arXiv 2412.05270, algorithm 1, with its limit on how fast steps grow.
    """

    def move(self, part: Part, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """The scaled gradient."""
        seed = int(part.entries["step"] - 1) // EVERY
        draw, rank = torch.Generator(grad.device).manual_seed(seed), self.rank(grad)
        low = torch.randn(rank, len(grad), generator=draw, device=grad.device).div_(rank**0.5).to(grad.dtype) @ grad
        tiny = torch.finfo(torch.float32).tiny
        lengths = low.norm(dim=0).clamp_(min=tiny)
        scaled = grad * (_adam(part, low, group).norm(dim=0) / lengths)
        last, now = part.of_whole("norm", lambda: grad.new_zeros(())), scaled.norm()
        most = torch.where(last > 0, GROWTH * last, now)
        scaled.mul_(most.div(now.clamp(min=tiny)).clamp_(max=1.0))
        last.copy_(torch.minimum(now, most))
        return scaled


def _adam(part: Part, low: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's step of a projection [rank, n] over the learning rate."""
    (keep, keep_square), steps = group["betas"], part.entries["step"]
    mean = part.of_whole("exp_avg", lambda: torch.zeros_like(low)).lerp_(low, 1.0 - keep)
    square = part.of_whole("exp_avg_sq", lambda: torch.zeros_like(low))
    square.mul_(keep_square).addcmul_(low, low, value=1.0 - keep_square)
    size = (square / (1.0 - keep_square**steps)).sqrt_().add_(group["eps"])
    return torch.div(mean, size, out=size).div_(1.0 - keep**steps)
