"""When a run is evaluated, and what its evaluations have found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from ... import ShoestringError
from ...callbacks.accounting.clock import MEASURED, Clock, Duration
from ...spelling import did_you_mean
from .intervals import interval, passed, steps_in

NEVER = 2**60  # a validation interval, in batches


class UnknownMetric(ShoestringError):
    """The goal is about a metric that nothing measures."""


class Evaluations:
    """Plans them on the run's clock, and keeps the newest metrics.

    every: how often; None leaves it to Lightning. at_end: whether there is a final one.
    goal: a metric and the number it is to be above or below, or None.
    """

    def __init__(self) -> None:
        self.every: Duration | None = None
        self.at_end = True
        self.goal: Any = None
        self.metrics: dict[str, float] = {}
        self._passed = 0.0

    def plan_every(self, every: str | None, *, at_end: bool = True) -> None:
        """Evaluate every `every` (None: only at the end), instead of when Lightning would."""
        self.every = interval(every) if every else Duration(float("inf"), "steps")
        self.at_end = at_end

    def start(self, clock: Clock) -> None:
        if self.every is not None and self.every.counts in MEASURED:
            self.every = clock.as_progress(self.every)  # ranks must agree on the step
        self._passed = passed(clock, self.every) if self.every else 0

    def plan(self, trainer: pl.Trainer, clock: Clock) -> None:
        """Tell Lightning to evaluate after this batch if a whole interval has passed, or not to."""
        assert self.every is not None
        moment = passed(clock, self.every)
        loop = trainer.fit_loop.epoch_loop
        trainer.val_check_batch = loop.total_batch_idx + 1 if moment > self._passed else NEVER
        self._passed = moment
        if trainer.should_stop and not self.at_end:
            trainer.limit_val_batches = 0

    def steps_between(self, clock: Clock) -> float | None:
        """About how many steps; None where Lightning decides."""
        return steps_in(clock, self.every) if self.every else None

    def check_goal(self, metrics: Mapping[str, Any]) -> None:
        """`UnknownMetric` where the trial before training does not measure what an evaluation would have to."""
        name = self.goal.metric if self.goal is not None else ""
        if name.startswith("val") and metrics and name not in metrics:
            legal, hint = ", ".join(sorted(metrics)), did_you_mean(name, metrics)
            raise UnknownMetric(f"goal.metric {name}: an evaluation measures {legal}" + (f"; {hint}" if hint else ""))

    def update(self, metrics: Mapping[str, float]) -> bool:
        """Keep the metrics of an evaluation. True where they reach the goal."""
        self.metrics.update(metrics)
        return bool(goal_reached(self.goal, metrics))

    def goal_facts(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The goal, and whether these metrics reach it, for the run's summary; nothing where there is none."""
        if (goal := self.goal) is None:
            return {}
        facts = {"metric": goal.metric, "above": goal.above, "below": goal.below}
        return {"goal": facts, "goal_reached": goal_reached(goal, metrics)}


def goal_reached(goal: Any, metrics: Mapping[str, float]) -> bool | None:
    """Whether `goal` (metric, above, below) is met; None if there is none or its metric was never logged."""
    if goal is None or goal.metric not in metrics:
        return None
    value = metrics[goal.metric]
    return value > goal.above if goal.above is not None else value < goal.below
