"""Step sizes of grids that are trained beside a model's weights (LSQ, arXiv 1902.08153): tensors in, tensors out.

The steps of a layer are one small tensor [out, groups, 1] that every rank holds whole; no optimizer or engine knows it.
Its gradient comes from the same backward as the weights' and sums up over micro-batches. At the boundary the ranks'
gradients are averaged in one sum, and `descend` moves the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .fake_quantization import check_groups, first_steps, highest, learned_step

MOMENTUM, MEMORY = 0.9, 0.999
_LEAST = 1e-30  # keeps steps positive and finite where a gradient would drive them to nothing


class LearnedSteps:
    """The steps of many layers by the name of their weight, what has been learned about them, and how they learn.

    Steps move on a logarithmic scale, so they stay positive and a rate is a relative change. Each time,
    s <- s exp(-rate m / sqrt(v)), where m averages s dL/ds with momentum 0.9, and v, one number a layer, its mean
    square (as in NovoGrad, arXiv 1905.11286); both are freed of their start at zero as in Adam. Channels keep their
    gradients' proportions, so what has none stays.
    """

    def __init__(self, bits: int, group_size: int | None = None) -> None:
        self.bits, self.group_size = bits, group_size
        self.steps: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def begin(self, name: str, weight: Tensor) -> None:
        """Start the steps of one layer from its whole weight."""
        check_groups(weight.shape, self.group_size, name)
        self._put(name, first_steps(weight, self.bits, self.group_size))

    def _put(self, name: str, steps: Tensor, mean: Tensor | None = None, square: Tensor | None = None) -> None:
        self.steps[name] = steps.requires_grad_()
        self._mean[name] = torch.zeros_like(steps) if mean is None else mean
        self._square[name] = torch.zeros((), device=steps.device) if square is None else square

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        """The weight on its grid, with gradients for both; as it is where there are no steps that fit it.

        They do not fit between a cut of the model and `cut`, when it is tried out.
        """
        steps = self.steps.get(name)
        if steps is None or len(steps) != len(weight) or weight[0].numel() % steps.shape[1]:
            return weight
        return learned_step(weight, steps, self.bits)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """Move all steps by the gradients of all ranks, and forget these. Collective: one sum of all gradients."""
        if not self.steps:
            return
        gradients = self._averaged()
        self._count += 1
        for name, steps in self.steps.items():
            slope = gradients[name] * steps
            self._mean[name].lerp_(slope, 1 - MOMENTUM)
            self._square[name].lerp_(slope.square().mean(), 1 - MEMORY)
            size = (self._square[name] / (1 - MEMORY**self._count)).sqrt().clamp(min=_LEAST)
            move = self._mean[name] / (1 - MOMENTUM**self._count) / size
            steps.mul_(torch.exp(-rate * move)).clamp_(min=_LEAST)

    def _averaged(self) -> dict[str, Tensor]:
        """Every layer's gradient, averaged over ranks; zero where a layer took no part. Clears them."""
        names = list(self.steps)
        flat = torch.cat([_gradient(self.steps[name]).flatten() for name in names])
        for steps in self.steps.values():
            steps.grad = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        parts = flat.split([self.steps[name].numel() for name in names])
        return {name: part.view_as(self.steps[name]) for name, part in zip(names, parts, strict=True)}

    def forget_gradients(self) -> None:
        for steps in self.steps.values():
            steps.grad = None

    @torch.no_grad()
    def put_on_grid(self, name: str, weight: Tensor, offset: int, numel: int) -> None:
        """Round part of a weight to its grid, in place: the elements from `offset` on of `numel`, flattened."""
        steps = self.steps[name].detach().flatten().to(weight.device)
        group = numel // len(steps)
        each = steps[torch.arange(offset, offset + len(weight), device=weight.device) // group]
        top = highest(self.bits)
        weight.copy_((weight.float() / each).round().clamp(-top, top) * each)

    # -- cuts -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def cut(self, name: str, kept: Iterable[tuple[int, Tensor]]) -> bool:
        """Leave out the steps of output channels that are gone; False where groups have lost inputs.

        kept: (dimension of the weight, a bool tensor over its indices). Groups that lost inputs must `begin` anew.
        """
        for dim, mask in kept:
            if dim == 0:
                rows = mask.nonzero().view(-1).to(self.steps[name].device)
                steps, mean = self.steps[name].detach()[rows], self._mean[name][rows]
                self._put(name, steps, mean, self._square[name])
            elif self.group_size is not None:
                return False
        return True

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Plain data; equal data is equal bits."""
        return {
            "count": self._count,
            "layers": {
                name: {
                    "groups": steps.shape[1], "steps": steps.detach().flatten().tolist(),
                    "mean": self._mean[name].flatten().tolist(), "square": self._square[name].item(),
                }
                for name, steps in self.steps.items()
            },
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._count = state["count"]
        for name, kept in state["layers"].items():
            steps, mean = (torch.tensor(kept[k], device=device).view(-1, kept["groups"], 1) for k in ("steps", "mean"))
            self._put(name, steps, mean, torch.tensor(kept["square"], device=device))


def _gradient(steps: Tensor) -> Tensor:
    return torch.zeros_like(steps) if steps.grad is None else steps.grad
