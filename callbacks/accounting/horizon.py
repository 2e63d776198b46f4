"""Where a run ends, in steps: rank 0 forecasts it from what steps have cost, and every rank follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl

from .budget import Budget, Guard, ImpossibleBudget
from .clock import Clock, steps_in_epochs


class Horizon:
    """The limits of a run and the last step that fits into them.

    Args:
        clock: whose horizons are written here and nowhere else.
        budget: the user's limits; the trainer's own `max_steps` and `max_epochs` join them.
        moved: called with (step, last step) whenever the end moves.
    """

    def __init__(self, clock: Clock, budget: Budget, moved: Callable[[int, int], None]) -> None:
        self.clock, self.budget, self.moved = clock, budget, moved
        self.ends: dict[str, int] = {}  # limits in steps, by what sets them
        self.since = 0, 0  # a step, and the epoch that began there
        self.steps_per_batch = 1.0  # beside those that accumulation leaves out
        self.counts_batches = False  # Lightning ends the run after whole epochs, in however many steps
        self.lag = 0  # steps after which the ranks know what was decided
        self.guard = Guard({})
        self._guard_state: dict[str, Any] | None = None

    def set_limits(self, trainer: pl.Trainer, batches: float) -> None:
        """Tell the clock what ends the run; `batches` are the micro-batches of an epoch. Again changes nothing."""
        limits = self.budget.limits()
        epochs = limits.pop("epochs", None)
        self.ends = {"steps": int(limits["steps"])} if "steps" in limits else {}
        if batches not in (0, float("inf")):
            count = trainer.max_epochs or 0
            self.clock.steps_per_epoch = steps_in_epochs(trainer, batches, max(1, count)) / max(1, count)
            if epochs is not None:
                self.ends["epochs"] = max(1, self._steps(trainer, batches, epochs))
            if count > 0:
                self.ends["max_epochs"] = self._steps(trainer, batches, count)
        elif epochs is not None:
            raise ImpossibleBudget(f"budget epochs={epochs:g}: this loader has no length. Use a budget of steps.")
        if trainer.max_steps and trainer.max_steps > 0:
            self.ends["max_steps"] = trainer.max_steps
        if self.ends:
            limits["steps"] = min(self.ends.values())
        before, self.clock.limits = self.clock.limits, limits
        if before == limits == self.guard.limits:
            return
        self.guard = Guard(limits, self.lag)
        if self.clock.horizons and before != limits:
            self._guard_state = None
            self.clock.stretch(self.clock.end_by_spend())
            self.moved(self.clock.step, self.clock.horizons[-1][2])
        elif self._guard_state:
            self.guard.load_state_dict(self._guard_state)
        if "steps" in limits and not self.clock.horizons:
            self.clock.replan(0, int(limits["steps"]))

    def begin_epoch(self, trainer: pl.Trainer) -> None:
        """An epoch begins at this step: the one before it may have had other data, or have been left early."""
        self.since, planned = (self.clock.step, trainer.current_epoch), list(self.clock.horizons)
        self.set_limits(trainer, trainer.num_training_batches)
        if planned and self.clock.horizons != planned:
            last, self.clock.horizons = self.clock.horizons[-1][2], planned
            self.clock.replan(self.clock.step, last)

    def _steps(self, trainer: pl.Trainer, batches: float, epochs: float) -> int:
        """The step of the run at which so many epochs have ended, if those to come are like this one."""
        step, epoch = self.since
        to_come = steps_in_epochs(trainer, batches, epochs) - steps_in_epochs(trainer, batches, epoch)
        return step + max(0, round(to_come * self.steps_per_batch))

    def learn_steps_per_batch(self, trainer: pl.Trainer) -> None:
        """Manual optimization steps when it likes: an end in epochs is where it will be at the pace so far.

        Lightning ends such a run itself, after whole epochs.
        """
        self.counts_batches, batches = True, trainer.num_training_batches
        loop, epochs = trainer.fit_loop.epoch_loop, trainer.max_epochs or 0
        pace = (self.clock.step - self.since[0]) / max(1, loop.batch_progress.current.processed)
        if pace == self.steps_per_batch or epochs <= 0 or batches == float("inf"):
            return
        self.steps_per_batch = pace
        last = max(self.clock.step, self._steps(trainer, batches, epochs))
        self.clock.steps_per_epoch = last / epochs
        self.ends |= {name: last for name in ("epochs", "max_epochs") if name in self.ends}
        self.guard.limits["steps"] = self.clock.limits["steps"] = last = min(self.ends.values())
        if self.name("steps") in ("epochs", "max_epochs") and last != self.clock.horizon:
            self.clock.replan(self.clock.step, last)

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
        name = self.name(forecast.binding if forecast else "steps")
        return None if self.counts_batches and name in ("epochs", "max_epochs") else name

    def name(self, binding: str) -> str:
        """What the user calls a limit of the clock: steps may be epochs, or an end of the trainer's own."""
        return min(self.ends, key=self.ends.__getitem__, default=binding) if binding == "steps" else binding

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {**self.guard.state_dict(), "since": list(self.since), "steps_per_batch": self.steps_per_batch}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self._guard_state = dict(state) if state else None
        if state:
            self.since = int(state["since"][0]), int(state["since"][1])
            self.steps_per_batch = float(state["steps_per_batch"])
