"""The optimizer's step within backward: a parameter steps as soon as its gradient is there, which is then freed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from ... import IncompatibleTechniques
from ...callbacks.contract import Settings
from .same_start import same_start

if TYPE_CHECKING:
    from ..monitor.nonfinite import NonFiniteSteps


def in_backward(strategy: Any, settings: Settings, clip: float | None, finite: NonFiniteSteps) -> list[pl.Callback]:
    """What makes a trainer step in backward.

    Args:
        strategy: Its name.
        settings: What the run accumulates, and its precision.
        clip: The norm to which gradients would be clipped.
        finite: Looks at gradients.

    Raises:
        IncompatibleTechniques: Something needs all gradients at once; names it.
    """
    accumulate = settings.accumulate_grad_batches
    reasons = {
        f"strategy {strategy}: only with single and ddp": strategy not in ("single", "ddp"),
        f"{accumulate} accumulated micro-batches, whose gradients are summed": accumulate > 1,
        "clipping by the norm of all gradients (gradient_clip_val)": bool(clip),
        "precision fp16, whose loss scale is judged by all gradients": settings.precision.startswith("16"),
    }
    if given := [reason for reason, holds in reasons.items() if holds]:
        raise IncompatibleTechniques(f"a step in backward has one gradient at a time. It does not go with {given[0]}.")
    return [StepInBackward(finite)]


class StepInBackward(pl.Callback):
    """Steps every parameter by itself: the same update as that of all together, with the optimizer's one state.

    A parameter whose gradient is not finite keeps its weight, and the step counts as not finite; but those that have
    had theirs before in the same backward have moved. A loss that is not finite moves none.

    Source: LOMO, arXiv 2306.09782; the hook is torch's `register_post_accumulate_grad_hook`.

    Args:
        finite: Looks at gradients.
    """

    def __init__(self, finite: NonFiniteSteps) -> None:
        self._finite = finite
        self._handles: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook every parameter that an optimizer steps."""
        world = trainer.world_size
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.requires_grad:
                        self._hook(optimizer, group, p, world)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the parameters as they were."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, optimizer: Any, group: dict[str, Any], parameter: Tensor, world: int) -> None:
        def step(p: Tensor) -> None:
            if world > 1:
                dist.all_reduce(p.grad.div_(world))  # type: ignore[union-attr]
            if self._finite.one_is(p.grad):  # type: ignore[arg-type]
                groups = optimizer.param_groups
                optimizer.param_groups = [{**group, "params": [p]}]
                try:
                    optimizer.step()
                finally:
                    optimizer.param_groups = groups
            p.grad = None

        self._handles.append(parameter.register_post_accumulate_grad_hook(step))


class ReducedInBackward(DDPStrategy):
    """DDP without its buckets, which hold all gradients: each is averaged over ranks where it steps."""

    def configure_ddp(self) -> None:
        """Begin with the weights of rank 0, as DDP does."""
        same_start(self.model)  # type: ignore[arg-type]
