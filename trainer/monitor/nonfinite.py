"""Losses and gradients that are not finite: seen at every step, skipped alike under every strategy, stopped in time.

A step whose gradients hold a NaN or an infinity changes nothing: no weight, no state of the optimizer, no technique.
DeepSpeed and fp16's scaler do so themselves; elsewhere the gradients are looked at once they are averaged over ranks,
so all ranks decide alike. On a CPU that is a look at one number. On a GPU the number stays there: torch's fused
optimizers read it (`found_inf`), and the host a step later. Only for other optimizers on a GPU does the host wait.
Where parameters step in backward, each is asked by itself: those that had theirs before have moved.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from ...callbacks.parameters.spread import here
from ..checkpoint.saver import NotFinite


class NonFiniteSteps:
    """Skips steps without finite gradients, and tells of them and of losses that are not finite.

    Args:
        limit: So many such steps of an attempt end it.
        report: Called on the rank that has seen one, with its step, micro-batch and loss.
    """

    def __init__(self, limit: int, report: Callable[..., None]) -> None:
        self.limit, self.report = limit, report
        self._skipped = False  # the step under way
        self._flag: Tensor | None = None  # the same, on a GPU
        self._overflow: Callable[[], bool] | None = None
        self._later: _Later | None = None

    def open(self, trainer: pl.Trainer) -> None:
        """Watch this trainer's optimizer steps."""
        plugin, engine = trainer.precision_plugin, getattr(trainer.strategy.model, "optimizer", None)
        self._later = _Later() if trainer.strategy.root_device.type == "cuda" else None
        self._overflow, self._plain = None, type(plugin)._after_closure.__get__(plugin)
        if str(trainer.precision).startswith("16"):
            return  # the scaler skips, as part of finding its scale
        if engine is not None and hasattr(engine, "overflow"):
            self._overflow = lambda: engine.overflow
        else:
            plugin._after_closure = self._gradients_ready  # type: ignore[method-assign]

    def _gradients_ready(self, module: pl.LightningModule, optimizer: Any) -> None:
        """Before techniques see the gradients, and before they are clipped."""
        grads = [
            grad if grad.layout is torch.strided else grad._values()
            for group in optimizer.param_groups
            for p in group["params"]
            if (grad := p.grad) is not None
        ]
        if grads:
            sharded = hasattr(grads[0], "to_local")
            largest = _largest_of_all(grads) if sharded else _largest(grads)
            if largest.is_cuda and not sharded and getattr(optimizer, "_step_supports_amp_scaling", False):
                self._flag = optimizer.found_inf = (~largest.isfinite()).float()
            elif not isfinite(largest.item()):
                self._skipped = True
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = None  # which every optimizer passes over
                return
        self._plain(module, optimizer)

    def one_is(self, gradient: Tensor) -> bool:
        """Whether a gradient that is stepped by itself is finite; one that is not makes the step under way such a one.

        On a GPU the host waits for the answer.
        """
        finite = isfinite(_largest([gradient]).item())
        self._skipped = self._skipped or not finite
        return finite

    def step_ends(self, loss: Tensor | None, step: int, batch: int) -> bool:
        """Whether this step was not finite on this rank; on a GPU, the step before."""
        skipped, self._skipped = self._skipped, False
        if self._overflow is not None:
            skipped = self._overflow()
        if self._later is None:
            value = 0.0 if loss is None else loss.item()
        else:
            value, flag, step, batch = self._later.exchange(loss, self._flag, step, batch)
            skipped, self._flag = skipped or flag > 0, None
        if not skipped and isfinite(value):
            return False
        self.report(step, batch, value, skipped)
        return True

    def check(self, steps: int) -> None:
        """`NotFinite`, on all ranks alike, where `steps` are too many."""
        if steps >= self.limit:
            raise NotFinite(
                f"{steps} steps had a loss or gradients that are not finite, and nonfinite_steps allows fewer than "
                f"{self.limit}: the run has stopped. The newest checkpoint is from before or has finite weights. Lower "
                "the learning rate, clip gradients, or look at the batches that the warnings name."
            )


def _largest(grads: list[Tensor]) -> Tensor:
    """The largest absolute element; on a CPU any number that is finite where this one is."""
    if not grads[0].is_cuda:  # a tenth of the time there; only a norm beyond the type's range is looked at twice
        norm = torch.stack(torch._foreach_norm(grads)).max()
        if isfinite(norm.item()):
            return norm
    return torch.stack(torch._foreach_norm(grads, inf)).max()


def _largest_of_all(grads: list[Tensor]) -> Tensor:
    """Of gradients that ranks hold parts of. Collective."""
    held = [part for grad in grads if (part := here(grad)).numel()]
    largest = _largest(held).float() if held else torch.zeros((), device=here(grads[0]).device)
    finite = largest.isfinite().float()  # how ranks would find the largest with a NaN among them is not said
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    return torch.where(finite > 0, 0.0, inf)


class _Later:
    """Numbers of the device that the host reads a step later, when they have long arrived."""

    def __init__(self) -> None:
        self._host = torch.zeros(2, dtype=torch.float64).pin_memory()
        self._copied = torch.cuda.Event()
        self._of = (0, 0)

    def exchange(
        self, loss: Tensor | None, flag: Tensor | None, step: int, batch: int
    ) -> tuple[float, float, int, int]:
        """Send the loss [] and flag [] of a step; what the step before has sent, with its step and micro-batch."""
        self._copied.synchronize()
        value, skipped = self._host.tolist()
        before, self._of = self._of, (step, batch)
        for place, sent in enumerate((loss, flag)):
            if sent is None:
                self._host[place] = 0.0
            else:
                self._host[place].copy_(sent.detach(), non_blocking=True)
        self._copied.record()
        return value, skipped, *before
