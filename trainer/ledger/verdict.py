"""What is wrong with a run that came to its end: such a run does not count as a success.

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from ...spelling import did_you_mean

# a limit -> the total that it limits, and how many of that total's units are one of the limit's
_TOTALS = {"hours": ("seconds", 3600.0), "device_hours": ("device_seconds", 3600.0), "flops": ("flops_realised", 1.0)}
OVERSPENT = 1.25  # of a limit: what the last steps, evaluation and checkpoint cost is an estimate up to here


def used(summary: Mapping[str, Any]) -> dict[str, float]:
    """The share of each limit of the budget that has been spent."""
    shares = {}
    for name, limit in summary["budget"].items():
        total, unit = _TOTALS.get(name, (name, 1.0))
        shares[name] = summary[total] / unit / limit
    return shares


def problems(summary: Mapping[str, Any]) -> list[str]:
    """A sentence for everything that keeps a run with these totals from being a success."""
    metrics = summary["metrics"]
    lines = [
        f"{name} is {value}: the model computes no numbers that it could be judged by"
        for name, value in metrics.items()
        if not isfinite(value)
    ]
    if "goal" in summary and summary["goal_reached"] is None and metrics:  # else evaluation was off
        goal, legal = summary["goal"]["metric"], ", ".join(sorted(metrics)) or "none"
        hint = did_you_mean(goal, metrics)
        lines.append(f"goal.metric {goal} was never measured; the metrics are {legal}" + (f" ({hint})" if hint else ""))
    for name, share in used(summary).items():
        if share > OVERSPENT:
            lines.append(f"{share:.0%} of budget.{name} ({summary['budget'][name]:g}) was spent: give more, or do less")
    return lines
