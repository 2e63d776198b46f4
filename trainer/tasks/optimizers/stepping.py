"""What our own optimizers share: the loss of a closure, and the parameters that have a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .... import ShoestringError
from ....callbacks.parameters.spread import here


class CannotStep(ShoestringError):
    """An optimizer that does not go with its settings, or with how the parameters are laid out."""


class Stepping(torch.optim.Optimizer):
    """An optimizer that says what happens to one parameter at a time, in `update`.

    steps_slices: of DTensors it steps what this rank holds, as a tensor of its own; set by the strategy.
    """

    steps_slices = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group, p in self._with_gradient():
                if self.steps_slices:
                    self.update_slice(p, group)
                else:
                    self.update(p, p.grad, self.state[p], group)
        return loss

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Step `p` in place. `state`: what is kept of it, empty before its first step."""
        raise NotImplementedError

    def by_slices(self, group: dict[str, Any]) -> bool:
        """Whether what is kept of this group's parameters is of slices, for DTensors."""
        return self.steps_slices

    def update_slice(self, p: Tensor, group: dict[str, Any]) -> None:
        """Step what this rank holds of a DTensor in place."""
        self.update(here(p), here(p.grad), self.state[p], group)  # type: ignore[arg-type]

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], Any]]:
        return ((group, p) for group in self.param_groups for p in group["params"] if p.grad is not None)
