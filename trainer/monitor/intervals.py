"""How often: durations that come again and again, on the run's clock."""

from __future__ import annotations

from ...callbacks.accounting.clock import BadDuration, Clock, Duration


def interval(text: str) -> Duration:
    """A duration that can be waited for again and again: `interval("5 min")`."""
    duration = Duration.parse(text)
    if duration.amount <= 0:
        raise BadDuration(f"{text!r} is not an interval; give a positive duration, as in '5 min' or '500 steps'")
    return duration


def passed(clock: Clock, every: Duration) -> float:
    """Return how many whole intervals have passed."""
    if every.counts == "progress":
        return clock.progress // every.amount
    if every.counts == "epochs":
        return clock.step / (clock.steps_per_epoch or 1) // every.amount
    return getattr(clock.spend, every.counts) // every.amount


def steps_in(clock: Clock, every: Duration) -> float:
    """About how many steps an interval is, by what steps have cost so far; infinity while nobody knows."""
    if every.counts == "progress":
        return max(1.0, every.amount * (clock.horizon or float("inf")))
    if every.counts == "epochs":
        return max(1.0, every.amount * (clock.steps_per_epoch or float("inf")))
    spent = getattr(clock.spend, every.counts)
    return max(1.0, every.amount * clock.step / spent) if spent and clock.step else float("inf")
