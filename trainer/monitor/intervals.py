"""How often: durations that come again and again, on the run's clock."""

from __future__ import annotations

from math import sqrt

from ...callbacks.accounting.clock import BadDuration, Clock, Duration

UNTIL_MEASURED = 300.0  # seconds between checkpoints as long as nobody knows what one costs
DAY = 86_400.0
LEAST_SHARE = 10  # an interval is so many times what a checkpoint costs, however often a run is interrupted
LONGEST = 2 * 3600.0  # seconds, however rarely


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


def best_interval(cost: float, mtbf: float) -> float:
    """Seconds between checkpoints such that saving and work done again together cost least: sqrt(2 cost mtbf).

    Money does not change it: a second of either is billed alike.
    Source: Young, "A first order approximation to the optimum checkpoint interval" (1974).

    Args:
        cost: Seconds that a checkpoint holds training up.
        mtbf: Mean seconds between failures and preemptions.

    Example:
        >>> best_interval(cost=2.0, mtbf=3600.0)
        120.0
    """
    return min(max(sqrt(2 * cost * mtbf), LEAST_SHARE * cost), LONGEST)


def between_failures(seconds: float, failures: int, nodes: int) -> float:
    """Mean seconds between failures and preemptions of a run: a day for each node, until it has met others.

    Args:
        seconds: That the run has taken so far, in all attempts.
        failures: That it has met.
        nodes: It runs on.
    """
    return (DAY / nodes + seconds) / (1 + failures)
