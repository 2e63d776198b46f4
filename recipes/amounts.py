"""What a recipe's durations (`warmup`, `every`) and budgets accept, on top of the units that all files share.

`duration` gives one in its canonical spelling, `amount` a budget in the units of its key: two spellings of one amount
become the same value, and a recipe the same hash.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from ..units import UnitError, quantity

SPELLING = {  # base unit -> what to write, for messages
    "s": "s, min, h, days",
    "kWh": "kWh, Wh",
    "$": "$ (before the number)",
    "%": "% (of the budget)",
    **{unit: unit for unit in ("steps", "epochs", "tokens", "samples", "flops")},
}
EXAMPLE = {
    "s": "90 min",
    "kWh": "500 Wh",
    "$": "$5",
    "steps": "200 steps",
    "epochs": "3 epochs",
    "tokens": "1.5e9 tokens",
    "samples": "1000 samples",
    "flops": "1e18 flops",
}
DURATION = (
    'a duration like "200 steps", "5%", "30 min" or "1e9 tokens" '
    "(units: s, min, h, days, steps, epochs, tokens, samples, flops, kWh, Wh, $, %)"
)


def duration(value: object, zero: bool = False) -> str:
    """A duration in its canonical spelling (`"5 min"` -> `"300 s"`); `zero` says whether none at all is allowed.

    Raises `UnitError` for anything but text with a unit, a negative one, and more than 100 %.
    """
    if not isinstance(value, str):
        bare = isinstance(value, int | float) and not isinstance(value, bool)
        raise UnitError(DURATION, f'add the unit: "{value} steps"' if bare else "")
    try:
        number, base = quantity(value)
    except UnitError as error:
        raise UnitError(DURATION, error.hint) from None
    if not base:
        raise UnitError(DURATION, f'add the unit: "{value.strip()} steps"')
    if number < 0 or (number == 0 and not zero) or (base == "%" and number > 100):
        raise UnitError(("a duration of 0 or more" if zero else "a duration above 0") + ", and at most 100%")
    return spelled(number, base)


def amount(value: object, base: str, scale: int = 1, whole: bool = False) -> float:
    """A budget in units of `scale` base units: `amount("2 min", "s", 3600)` is 2/60 (hours), as is a bare 2/60.

    Raises `UnitError` for a unit of another kind, and for what is no possible budget: zero, negative, infinite, a
    fraction where only `whole` ones exist.
    """
    units = SPELLING[base]
    allowed = f'a number above 0, or text with a unit: {units}; for example "{EXAMPLE[base]}"'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnitError(allowed)
    number = _read(value, base, scale, allowed)
    if number <= 0:
        raise UnitError("a number above 0", "impossible budget: no step fits into it; remove the key for no limit")
    if whole and number.denominator != 1:
        raise UnitError(f"a whole number of {base}")
    return float(number)


def spelled(number: Fraction, base: str) -> str:
    """A number and its base unit as text that `quantity` reads back: `"300 s"`, `"$5"`, `"40%"`, `"1e18 flops"`."""
    digits = repr(float(number)).removesuffix(".0").replace("e+", "e")
    return {"$": f"${digits}", "%": f"{digits}%"}.get(base, f"{digits} {base}")


def _read(value: int | float | str, base: str, scale: int, allowed: str) -> Fraction:
    if not isinstance(value, str):
        if not math.isfinite(value) or abs(value) > 1e300:
            raise UnitError("a finite number above 0", "remove the key for no limit")
        return Fraction(value)
    try:
        number, unit = quantity(value)
    except UnitError as error:
        raise UnitError(allowed, error.hint) from None
    if not unit:
        raise UnitError(allowed, f"a number needs no quotes: {value.strip()}")
    if unit != base:
        raise UnitError(allowed)
    return number / scale


JUDGED = 'null, or "min METRIC" or "max METRIC", like "max val_accuracy"; of a loss the name will do: val_loss'


def judged_by(text: str) -> tuple[Literal["min", "max"], str]:
    """How a metric is judged, and its name: "max val_accuracy", or "val_loss", which is to be small.

    Raises:
        UnitError: It does not say whether the metric is to be small or large.

    Example:
        >>> judged_by("val_loss")
        ('min', 'val_loss')
    """
    mode, _, metric = text.strip().rpartition(" ")
    if not mode and "loss" in metric:
        mode = "min"
    if mode == "min":
        return "min", metric
    if mode == "max":
        return "max", metric
    near = f'"min {metric}" or "max {metric}"' if metric and not mode else ""
    raise UnitError(JUDGED, f"say which is better: {near}" if near else "")
