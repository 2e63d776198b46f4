"""Where a run ends, in steps: rank 0 forecasts it from what steps have cost, and every rank follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl

from .budget import Budget, Guard
from .clock import Clock


class Horizon:
    """The limits of a run and the last step that fits into them.

    Args:
        clock: whose horizons are written here and nowhere else.
        budget: the user's limits; the trainer's own `max_steps` and `max_epochs` join them.
        moved: called with (step, last step) whenever the end moves.
    """

    def __init__(self, clock: Clock, budget: Budget, moved: Callable[[int, int], None]) -> None:
        self.clock, self.budget, self.moved = clock, budget, moved
        self.lag = 0  # steps after which the ranks know what was decided
        self.guard = Guard({})
        self._guard_state: dict[str, Any] | None = None

    def set_limits(self, trainer: pl.Trainer, batches: float) -> None:
        """Tell the clock what ends the run; `batches` are the micro-batches of an epoch. Again changes nothing."""
        limits = self.budget.limits()
        ends = [limits["steps"]] if "steps" in limits else []
        if batches not in (0, float("inf")):
            self.clock.steps_per_epoch = -(-int(batches) // trainer.accumulate_grad_batches)
            if trainer.max_epochs and trainer.max_epochs > 0:
                ends.append(trainer.max_epochs * self.clock.steps_per_epoch)
        if trainer.max_steps and trainer.max_steps > 0:
            ends.append(trainer.max_steps)
        if ends:
            limits["steps"] = min(ends)
        before, self.clock.limits = self.clock.limits, limits
        self.guard = Guard(limits, self.lag)
        if self.clock.horizons and before != limits:
            self._guard_state = None
            self.clock.stretch(self.clock.end_by_spend())
            self.moved(self.clock.step, self.clock.horizons[-1][2])
        elif self._guard_state:
            self.guard.load_state_dict(self._guard_state)
        if "steps" in limits and not self.clock.horizons:
            self.clock.replan(0, int(limits["steps"]))

    def vote(self) -> float:
        """Rank 0, once a step: a new last step, or 0 where the plan stays."""
        self.guard.observe(self.clock)
        return float(self.guard.decide(self.clock) or 0)

    def first_vote(self, update_reserve: Callable[[], None]) -> float:
        """`vote` after the first step of an attempt, which all ranks wait for: what it cost is known at once.

        set_aside: tells the guard which pauses are to come, by what the step has cost.
        """
        self.guard.lag = 0
        self.guard.observe(self.clock)
        update_reserve()
        vote = float(self.guard.decide(self.clock) or 0)
        self.guard.lag = self.lag
        return vote

    def follow(self, last: float) -> None:
        """Rank 0's word has arrived; 0 changes nothing."""
        if last and last != self.clock.horizon:
            self.clock.replan(self.clock.step, int(last))
            self.moved(self.clock.step, int(last))

    def reached(self) -> str | None:
        """The limit that has ended the run, or None while it goes on."""
        horizon = self.clock.horizon
        if horizon is None or self.clock.step < horizon:
            return None
        forecast = self.guard.forecast(self.clock)
        return forecast.binding if forecast else "steps"

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return self.guard.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self._guard_state = dict(state) if state else None
