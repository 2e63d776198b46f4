"""Learning-rate schedules over the budget: they end when it ends (budgeted training, arXiv 1905.04753)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl

from ..accounting.clock import Duration, clock_of
from ..contract import Card, Technique, require

log = logging.getLogger("shoestring")

# progress in [0, 1] -> factor in [0, 1]; every schedule but `constant` ends at 0
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,  # to zero, not to 10 %: arXiv 2502.15938
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),  # arXiv 1608.03983
    "wsd": lambda p: 1.0 if p < 0.8 else (1.0 - p) / 0.2,  # warmup-stable-decay: arXiv 2404.06395
    "rex": lambda p: (1.0 - p) / (1.0 - p / 2.0),  # reflected exponential: arXiv 2107.04197
    "constant": lambda p: 1.0,
}


def factor(shape: str, progress: float, warmed: float, floor: float = 0.0) -> float:
    """Return the factor of the peak learning rate at `progress`; `warmed` in [0, 1]: the share of warmup done."""
    return warmed * (floor + (1.0 - floor) * SHAPES[shape](min(1.0, progress)))


def within_cycle(progress: float, cycles: int) -> float:
    """Progress in the cycle that `progress` falls into; the run's end is the last one's end (arXiv 1608.03983)."""
    return progress * cycles % 1.0 if progress < 1.0 else 1.0


@dataclass(kw_only=True, eq=False, repr=False)
class LRSchedule(Technique, pl.Callback):
    """Multiply every parameter group's learning rate by a function of the run's progress.

    A step takes the rate of its middle; when the run has ended the rate is at its floor. Schedulers of the module then
    have no effect on the rate; the schedule that a budget brings by itself leaves it to them instead.

    Source: arXiv 1905.04753.

    Args:
        shape: linear | cosine | wsd | rex | constant.
        warmup: Duration of a linear rise from 0, such as "200 steps" or "5%".
        floor: Where the rate ends, as a share of the peak in [0, 1].
        cycles: How often the shape is run, warmup included once; for `lottery_ticket`, its rounds + 1.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import LRSchedule
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[LRSchedule(shape="cosine", warmup="5%")])
        >>> factor("cosine", progress=0.5, warmed=1.0, floor=0.1)  # share of the peak rate, half-way
        0.55
    """

    card = Card(
        name="lr_schedule",
        does="anneals the learning rate to its floor exactly when the budget ends",
        paper="1905.04753",
        saves={"steps"},
        writes={"lr"},
    )

    shape: str = "linear"
    warmup: str = "0%"
    floor: float = 0.0
    cycles: int = 1
    gives_way = False  # to schedulers of the module: where nobody has asked for this one

    def check(self) -> None:
        require(self.shape in SHAPES, self, "shape", " | ".join(SHAPES))
        require(0 <= self.floor <= 1, self, "floor", "a share between 0 and 1")
        require(self.cycles > 0, self, "cycles", "a positive number")
        Duration.parse(self.warmup)

    @classmethod
    def noop(cls) -> Self:
        return cls(shape="constant")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._peaks: list[list[float]] = []
        self._idle = False
        self._warmup = Duration.parse(self.warmup)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = ", ".join(dict.fromkeys(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs))
        still = self.shape == "constant" and not self._warmup.amount
        self._idle = still or (bool(own) and self.gives_way)
        if own and not still and trainer.is_global_zero:
            log.warning(
                "the module's own %s sets the learning rate, so the budget does not anneal it; give "
                "techniques=[LRSchedule()] to have it end at its floor" if self.gives_way else
                "lr_schedule sets the learning rate; the module's own %s has no effect on it", own,
            )  # fmt: skip
        if not self._peaks:  # a resumed run has them in its state: the optimizer's rates may be decayed already
            self._peaks = [[_peak(group, bool(own)) for group in o.param_groups] for o in trainer.optimizers]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._set(trainer, 0.5)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set(trainer, 0.0)

    def _set(self, trainer: pl.Trainer, ahead: float) -> None:
        """The rates of the step at which the clock will be `ahead` steps from now."""
        if self._idle:
            return
        clock = clock_of(trainer)
        step = clock.step + ahead
        warmed = clock.toward(self._warmup, step) if self._warmup.amount else 1.0
        scale = factor(self.shape, within_cycle(clock.progress_at(step), self.cycles), warmed, self.floor)
        for optimizer, peaks in zip(trainer.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale * group.get("warmup_factor", 1.0)

    def scale_peaks(self, trainer: pl.Trainer, ratios: Mapping[int, float]) -> None:
        """Resumed with other rates than the run began with. ratios: new to old, by `id` of a parameter group."""
        for optimizer, peaks in zip(trainer.optimizers, self._peaks, strict=False):
            for i, group in enumerate(optimizer.param_groups):
                peaks[i] *= ratios.get(id(group), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"peaks": getattr(self, "_peaks", [])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._peaks = state_dict["peaks"]


def _peak(group: dict[str, Any], scheduled: bool) -> float:
    """The rate a group was meant to have: a scheduler may have lowered it already for its first step."""
    noted: float = group.get("max_lr", group.get("initial_lr", group["lr"])) if scheduled else group["lr"]
    return noted
