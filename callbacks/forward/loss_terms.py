"""Terms that techniques add to a LightningModule's own loss, for the length of a fit.

`training_step` is wrapped once, however many terms there are, and comes back as it was when the last one is removed.
A term watches the module's own step (`capture`) and then says what to add to its loss (`compute`). Everything happens
inside the step, so precision, DDP and DeepSpeed treat a term like any other part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import pytorch_lightning as pl
from torch import Tensor

from ... import ShoestringError


class NoLoss(ShoestringError):
    """There is no loss to add to."""


@dataclass(frozen=True)
class Step:
    """The module's own step, and what it was called with."""

    call: Callable[..., Any]
    args: tuple[Any, ...]

    @property
    def batch(self) -> Any:
        return self.args[0]

    def again(self) -> Tensor:
        """The loss [] of one more run of the module's own step."""
        return _loss(self.call(*self.args))


class AuxiliaryLoss(Protocol):
    def capture(self) -> AbstractContextManager[Any]:
        """Open around the module's own step; what it gives is handed to `compute`."""
        ...

    def compute(self, watched: Any, loss: Tensor, step: Step) -> Tensor:
        """What to add to the module's own `loss`, []."""
        ...


class _WithTerms:
    """Stands in for `training_step`."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.terms: list[AuxiliaryLoss] = []

    def __call__(self, *args: Any) -> Any:
        with ExitStack() as stack:
            watched = [stack.enter_context(term.capture()) for term in self.terms]
            out = self.plain(*args)
        if out is None:  # Lightning's way to skip a batch
            return None
        loss, step = _loss(out), Step(self.plain, args)
        total = loss
        for term, seen in zip(self.terms, watched, strict=True):
            total = total + term.compute(seen, loss, step)
        return {**out, "loss": total} if isinstance(out, Mapping) else total


def _loss(out: Any) -> Tensor:
    loss = out.get("loss") if isinstance(out, Mapping) else out
    if not isinstance(loss, Tensor):
        raise NoLoss(f"training_step returned {type(out).__name__}; it must return the loss or a dict with 'loss'")
    return loss


def add_auxiliary_loss(module: pl.LightningModule, term: AuxiliaryLoss) -> None:
    """Add `term` to the loss that `module.training_step` returns."""
    if not module.automatic_optimization:
        raise NoLoss(f"{type(module).__name__} optimizes by hand, so its loss cannot be added to; return it instead")
    wrapped = vars(module).get("training_step")
    if not isinstance(wrapped, _WithTerms):
        wrapped = _WithTerms(module.training_step)
        module.training_step = wrapped  # type: ignore[assignment, method-assign]
    wrapped.terms.append(term)


def remove_auxiliary_loss(module: pl.LightningModule, term: AuxiliaryLoss) -> None:
    """Take `term` away again; harmless where it is not there."""
    wrapped = vars(module).get("training_step")
    if not isinstance(wrapped, _WithTerms):
        return
    wrapped.terms = [other for other in wrapped.terms if other is not term]
    if wrapped.terms:
        return
    bound = getattr(wrapped.plain, "__self__", None)
    if bound is not None and id(bound) == id(module):  # its own method, found on the class again
        del module.training_step
    else:
        module.training_step = wrapped.plain  # type: ignore[method-assign]
