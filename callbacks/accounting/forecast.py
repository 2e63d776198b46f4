"""Which limit of a budget ends a run first, and at which step: one rule for plans, for runs, and for resumed ones.

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """The end of a budget, as seen from one step."""

    last: int  # the last step that fits
    binding: str  # the limit that decides


def first_end(ends: Mapping[str, float]) -> Forecast | None:
    """The limit that ends a run, of those whose last step is known.

    Args:
        ends: Limit -> the step at which it is reached, fractions of a step too.

    Returns:
        The earliest, the first named of several at once; None where there is none.

    Example:
        >>> first_end({"usd": 40.9, "tokens": 40.2})
        Forecast(last=40, binding='tokens')
    """
    if not ends:
        return None
    binding = min(ends, key=ends.__getitem__)
    return Forecast(math.floor(ends[binding]), binding)


def first_exhausted(limits: Mapping[str, float], spent: Mapping[str, float], steps: float = 1) -> Forecast | None:
    """The limit that ends a run whose steps go on to cost what they have cost so far.

    Args:
        limits: As in `Budget.limits`.
        spent: In the same units, by `steps` steps. What costs nothing ends nothing.
        steps: From the run's beginning.

    Returns:
        None where nothing of what is limited has been spent.

    Example:
        >>> first_exhausted({"usd": 10.0, "steps": 500}, spent={"usd": 0.5}, steps=20)
        Forecast(last=400, binding='usd')
    """
    ends = {name: steps * limit / spent[name] for name, limit in limits.items() if spent.get(name, 0) > 0}
    return first_end(ends | ({"steps": limits["steps"]} if "steps" in limits else {}))
