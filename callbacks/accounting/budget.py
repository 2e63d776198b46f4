"""Stop exactly when the budget ends, annealed: the horizon is planned in steps and re-planned from measured cost.

A budget has any of the limits below; the first one exhausted ends the run. Time, money and energy are not known in
steps beforehand, so the guard turns them into a last step, again and again: last = step + (limit - spent - reserve) /
cost of a step. The reserve is what must still happen after the last step: the final checkpoint and evaluation. Every
schedule reads progress towards that last step, so the learning rate is at its floor when it comes
(budgeted training: arXiv 1905.04753).

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from ... import ShoestringError
from .clock import Clock, Spend
from .forecast import Forecast, first_end


class ImpossibleBudget(ShoestringError):
    """A budget that no run can respect."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a run; the first one reached ends it, with the learning rate fully decayed. None means no limit.

    Args:
        usd: Money of all attempts, in US dollars.
        hours: Wall time of all attempts.
        device_hours: Wall time of all attempts times devices.
        tokens: Trained on by all ranks together.
        samples: Trained on by all ranks together.
        steps: Optimizer steps.
        epochs: Passes over the training data; parts of one too, rounded down to a step.
        flops: Executed matrix FLOPs of all ranks together.
        kwh: Energy of all attempts.

    Raises:
        ImpossibleBudget: A limit is not a positive number.

    Example:
        >>> Budget(usd=20, hours=2.5).given()
        {'usd': 20, 'hours': 2.5}
    """

    usd: float | None = None
    hours: float | None = None
    device_hours: float | None = None
    tokens: float | None = None
    samples: float | None = None
    steps: float | None = None
    epochs: float | None = None
    flops: float | None = None
    kwh: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ImpossibleBudget(f"budget {name}={value!r}: a limit is a positive number")
            if name in ("steps", "samples", "tokens") and value < 1:
                raise ImpossibleBudget(f"budget {name}={value!r}: it must be at least 1")

    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def limits(self) -> dict[str, float]:
        """Limits in the clock's units: hours become seconds, device-hours stay hours."""
        return {("seconds" if k == "hours" else k): (v * 3600 if k == "hours" else v) for k, v in self.given().items()}

    def __bool__(self) -> bool:
        return bool(self.given())


def refuse_uncounted(limits: Mapping[str, float], first: Spend) -> None:
    """`ImpossibleBudget` if the `first` step counted nothing of what is limited: such a run would never end."""
    for name, why in _UNCOUNTED.items():
        if name in limits and getattr(first, name) <= 0:
            raise ImpossibleBudget(f"budget {name}={limits[name]:g}: {why}")


def refuse_spent(limits: Mapping[str, float], startup: Spend) -> None:
    """`ImpossibleBudget` if nothing is left of a limit once the run has started up, before its first step."""
    for name, limit in limits.items():
        if name in _MEASURED and (spent := getattr(startup, name)) >= limit:
            raise ImpossibleBudget(
                f"budget {name}={limit:g}: starting up alone has taken {spent:.3g}, so not one step fits. Give more."
            )


_UNCOUNTED = {
    "tokens": "the batches of the first step have no 'input_ids' to count. Use a budget of samples or steps instead.",
    "samples": "the batches of the first step have no tensor with a first dimension to count. Use a budget of steps.",
    "flops": "the first step ran no matrix product to count. Use a budget of steps, or the accountant's count_flops.",
}


class Guard:
    """Turns spend into the last step that fits. Pure bookkeeping: rank 0 owns one, every rank follows its word.

    `lag`: how many steps late a decision is heard and the ranks' sums are known (0 alone, 1 with company).
    `reserve_seconds`: what must still happen after the last step: the final evaluation and checkpoint.
    `pauses`: those to come before it, as name -> (every so many steps, seconds each).

    The plan moves rarely: a step's cost jitters, and every move bends the schedules. A move is made when it is worth
    `HYSTERESIS` of what remains, and after one move the next waits until only `REPLAN_DECAY` of that is left, unless it
    is a `REPLAN_JUMP`. So a run of n steps moves its end about log(n) / log(1 / REPLAN_DECAY) times, and freely in its
    last few steps.
    """

    WINDOW = 100  # steps whose cost is remembered
    SPARSE_CHECK_STEPS = 200  # steps from the end, where looking at every eighth is enough
    FINAL_STEPS = 3  # the last steps, which are counted at the cost of an expensive one
    HYSTERESIS, REPLAN_DECAY, REPLAN_JUMP = 0.02, 0.8, 0.2

    def __init__(self, limits: Mapping[str, float], lag: int = 0) -> None:
        self.limits = dict(limits)
        self.lag = lag
        self.reserve_seconds = 0.0
        self.pauses: dict[str, tuple[float, float]] = {}
        self._costs: dict[str, deque[float]] = {name: deque(maxlen=self.WINDOW) for name in (*limits, "seconds")}
        self._seen: dict[str, float] = {}
        self._nondecreasing_steps = dict.fromkeys(self._costs, 0)  # steps since a cost was lower than the one before
        self._warming = set(_MEASURED)  # their only cost so far is the first step's, which also warms up
        self._paced = math.inf  # steps that remained after the last move

    # -- measuring --------------------------------------------------------------------------------------------------
    def observe(self, clock: Clock) -> None:
        """Note what the step that just ended has cost. Called once a step."""
        for name, costs in self._costs.items():
            total = getattr(clock.spend, name)
            if name in self._seen:
                if self.lag and name in _SUMMED and total == self._seen[name]:
                    continue  # the ranks' sums are still under way
                if costs and name in self._warming:
                    costs.clear()
                    self._warming.remove(name)
                cost = total - self._seen[name]
                self._nondecreasing_steps[name] = (
                    1 if costs and cost < costs[-1] else self._nondecreasing_steps[name] + 1
                )
                costs.append(cost)
            self._seen[name] = total

    def skip(self, clock: Clock) -> None:
        """A pause has ended (evaluation, checkpoint): it is spent, but it is not the cost of a step."""
        for name in self._costs:
            if name in _MEASURED or name not in self._seen:
                self._seen[name] = getattr(clock.spend, name)

    def step_seconds(self) -> float:
        """Return the recent seconds of a step; 0 while none has been measured."""
        return _mean(self._costs["seconds"])

    # -- forecasting ------------------------------------------------------------------------------------------------
    def forecast(self, clock: Clock) -> Forecast | None:
        """The last step that fits, or None while no step has been measured."""
        ends = {name: self._last(name, limit, clock) for name, limit in self.limits.items()}
        return first_end({name: last for name, last in ends.items() if last is not None})

    def _last(self, name: str, limit: float, clock: Clock) -> int | None:
        if name == "steps":
            return int(limit)
        costs = self._costs[name]
        each = costs[-1] if costs and self._grows(name) else _mean(costs)
        if each <= 0:
            return None
        fits = self._fits(name, limit, clock, each)
        if fits > self.WINDOW:
            return clock.step + fits
        surely = self._fits(name, limit, clock, self._cost_upper_bound(name))
        # counted amounts are never exceeded; of measured ones a rare expensive step is no reason to creep for long
        near = min(fits, surely) if name in _COUNTED else fits
        return clock.step + (surely if near <= self.FINAL_STEPS + self.lag else fits)

    def _fits(self, name: str, limit: float, clock: Clock, each: float) -> int:
        """How many more steps fit at `each`, with the pauses between them and what comes after the last."""
        per_second = self._per_second(name, clock)
        late = self.lag * each if name in _SUMMED else 0.0
        left = limit - getattr(clock.spend, name) - late - per_second * self.reserve_seconds
        most = max(0, min(math.floor(left / each), MAX_STEPS))
        if not per_second or not self.pauses:
            return most
        if most > 10 * self.WINDOW:  # far away an average will do
            paused = sum(seconds / every for every, seconds in self.pauses.values())
            return min(MAX_STEPS, math.floor(max(0.0, left) / (each + per_second * paused)))

        def cost(steps: int) -> float:
            paused = sum(seconds * _between(clock.step, steps, every) for every, seconds in self.pauses.values())
            return steps * each + per_second * paused

        return max(0, bisect_right(range(most + 1), left, key=cost) - 1)

    def _cost_upper_bound(self, name: str) -> float:
        """What a step may cost: of measured amounts the dearest tenth, of counted ones the most there can be."""
        costs = list(self._costs[name])
        if name in _MEASURED:
            return max(_mean(costs), sorted(costs)[-max(1, len(costs) // 10)])
        if not self._grows(name):
            return max(costs)
        rise = max((after - before for before, after in pairwise(costs)), default=0.0)
        return costs[-1] + (1 + 2 * self.lag) * rise

    def _grows(self, name: str) -> bool:
        """Whether a counted cost has not fallen for as long as is remembered: it is constant, or warms up."""
        return name in _COUNTED and self._nondecreasing_steps[name] >= len(self._costs[name])

    def _per_second(self, name: str, clock: Clock) -> float:
        """What a second costs, of amounts that run on while no step is made."""
        if name not in _MEASURED:
            return 0.0
        if name in self._warming:
            return getattr(clock.spend, name) / max(clock.spend.seconds, 1e-9)
        return _mean(self._costs[name]) / max(_mean(self._costs["seconds"]), 1e-9)

    def is_overrun(self, clock: Clock, seconds: float) -> bool:
        """Whether so many seconds more would go over a limit of time, money or energy."""
        share = 1 + seconds / max(clock.spend.seconds, 1e-9)
        measured = {name: limit for name, limit in self.limits.items() if name in _MEASURED}
        return any(getattr(clock.spend, name) * share > limit for name, limit in measured.items())

    # -- deciding ---------------------------------------------------------------------------------------------------
    def decide(self, clock: Clock) -> int | None:
        """A new last step, if the end should move; otherwise None. While the end is far it is asked now and then."""
        planned = clock.horizon
        if planned is not None and planned - clock.step > self.SPARSE_CHECK_STEPS and clock.step % 8:
            return None
        forecast = self.forecast(clock)
        if forecast is None:
            return None
        earliest = clock.step + self.lag  # the first step at which the run could stop
        last = max(forecast.last, earliest)
        if planned is not None and not self._moves(last, planned, earliest, clock.step):
            return None
        self._paced = last - clock.step
        return last

    def _moves(self, last: int, planned: int, earliest: int, step: int) -> bool:
        if planned <= earliest or last == planned:
            return False
        if last == earliest:
            return True
        remaining, moved = planned - step, abs(last - planned)
        if moved < self.HYSTERESIS * remaining:
            return False
        return remaining <= self.REPLAN_DECAY * self._paced or moved >= self.REPLAN_JUMP * remaining

    # -- state: counted amounts repeat exactly after a resume, measured ones are measured anew -------------------------
    def state_dict(self) -> dict[str, Any]:
        counted = {name: list(costs) for name, costs in self._costs.items() if name in _COUNTED}
        return {"costs": counted, "nondecreasing": dict(self._nondecreasing_steps), "paced": self._paced}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, costs in state["costs"].items():
            if name in self._costs:
                self._costs[name].extend(costs)
                self._nondecreasing_steps[name] = state["nondecreasing"][name]
        self._paced = state["paced"]


_MEASURED = frozenset({"seconds", "device_hours", "usd", "kwh"})  # and noisy
_COUNTED = frozenset({"samples", "tokens", "flops"})
_SUMMED = _COUNTED | {"kwh"}  # over ranks
MAX_STEPS = 10**12


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _between(step: int, steps: int, every: float) -> float:
    """How many multiples of `every` lie from `step`, whose pause is still to come, to before `step + steps`."""
    return (step + steps - 1) // every - (step - 1) // every if steps > 0 else 0.0
