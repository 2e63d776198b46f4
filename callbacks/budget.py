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
from collections import deque
from dataclasses import dataclass, fields

from .. import ShoestringError
from .clock import Clock


class ImpossibleBudget(ShoestringError):
    """A budget that no run can respect."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Ceilings of a run; the first one reached ends it. `None` means no limit.

    usd, kwh             money and energy of all attempts
    hours, device_hours  wall time of all attempts, and that x devices
    tokens, samples, steps, flops   work done by the run, all ranks together
    """

    usd: float | None = None
    hours: float | None = None
    device_hours: float | None = None
    tokens: float | None = None
    samples: float | None = None
    steps: float | None = None
    flops: float | None = None
    kwh: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ImpossibleBudget(f"budget {name}={value!r}: a limit is a positive number")

    def given(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def limits(self) -> dict[str, float]:
        """Limits in the clock's units: hours become seconds, device-hours stay hours."""
        return {("seconds" if k == "hours" else k): (v * 3600 if k == "hours" else v) for k, v in self.given().items()}

    def __bool__(self) -> bool:
        return bool(self.given())


@dataclass(frozen=True)
class Forecast:
    """When a budget ends, as seen from one step."""

    last: int  # the last step that fits
    binding: str  # the limit that decides


class Guard:
    """Turns spend into the last step that fits. Pure bookkeeping: rank 0 owns one, every rank follows its word.

    `lag` is how many further steps run before a decision is heard by all ranks (0 alone, 1 with company).
    """

    WINDOW = 50  # steps whose cost is remembered
    HYSTERESIS = 0.02  # a re-plan must move the end by this share of what remains

    def __init__(self, limits: dict[str, float], lag: int = 0) -> None:
        self.limits = limits
        self.lag = lag
        self.behind = lag  # steps whose share of the ranks' sums is still under way
        self.reserve_seconds = 0.0  # final checkpoint and evaluation
        self._costs: dict[str, deque[float]] = {name: deque(maxlen=self.WINDOW) for name in limits}
        self._seen: dict[str, float] = {}
        self._warming = True

    def observe(self, clock: Clock) -> None:
        """Note what the step that just ended has cost. Called once a step."""
        for name, costs in self._costs.items():
            total = clock.spend.get(name)
            if name in self._seen:
                if len(costs) == 1 and self._warming:
                    costs.clear()  # the first step also warms up: it counts only until there is a second
                    self._warming = False
                costs.append(total - self._seen[name])
            self._seen[name] = total

    def skip(self, clock: Clock) -> None:
        """Forget a pause (evaluation, checkpoint): it is spent, but it is not the cost of a step."""
        for name in self._costs:
            self._seen[name] = clock.spend.get(name)

    def forecast(self, clock: Clock) -> Forecast | None:
        """The last step that fits, or None while no step has been measured."""
        best: Forecast | None = None
        for name, limit in self.limits.items():
            last = self._last(name, limit, clock)
            if last is not None and (best is None or last < best.last):
                best = Forecast(last, name)
        return best

    def _last(self, name: str, limit: float, clock: Clock) -> int | None:
        if name == "steps":
            return int(limit)
        costs = self._costs[name]
        if not costs:
            return None
        mean = sum(costs) / len(costs)
        if mean <= 0:
            return None
        late = self.behind if name in _SUMMED else 0
        left = limit - clock.spend.get(name) - late * mean - self._reserve(name, clock)
        fits = math.floor(left / mean + 1e-9)
        if fits <= 3 + self.lag:  # the last mile: a step may be as dear as the dearer ones lately
            recent = sorted(costs)[-max(1, len(costs) // 10)] if name in _NOISY else mean
            fits = math.floor(left / recent + 1e-9)
        return clock.step + max(fits, 0)

    def _reserve(self, name: str, clock: Clock) -> float:
        rate = {"seconds": 1.0, "device_hours": 1 / 3600, "usd": 1.0, "kwh": 1.0}.get(name)
        if rate is None or clock.spend.seconds <= 0:
            return 0.0
        return self.reserve_seconds * clock.spend.get(name) / clock.spend.seconds

    def decide(self, clock: Clock) -> int | None:
        """A new last step, if the horizon should move; otherwise None."""
        forecast = self.forecast(clock)
        if forecast is None:
            return None
        last = max(forecast.last, clock.step + self.lag)
        planned = clock.horizon
        if planned is None:
            return last
        moved = abs(last - planned)
        if moved == 0 or moved < self.HYSTERESIS * (planned - clock.step):
            return None
        return last


_NOISY = frozenset({"seconds", "device_hours", "usd", "kwh"})
_SUMMED = frozenset({"samples", "tokens", "flops", "kwh"})
