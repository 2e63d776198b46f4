"""Amounts with a unit, as people write them: `2 min`, `1.5e9 tokens`, `$5`, `500 Wh`, `40%`, `20 GB`, `5 ms`.

The one vocabulary of recipes, techniques, cluster files and command lines. Numbers become exact fractions of the base
unit, so that two spellings of one amount are the same float, and a recipe that spells it otherwise has the same hash.

>>> quantity("2 min")
(Fraction(120, 1), 's')
>>> quantity("1.5 KiB", BYTES)
(Fraction(1536, 1), 'bytes')

(`pydantic.ByteSize` is not used for bytes: it reads `5 Mbit` as well, and no `1e9 B`.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction

from .spelling import did_you_mean

Vocabulary = Mapping[str, tuple[str, int | Fraction]]  # unit in lower case -> (base unit, factor to it)

TIME: Vocabulary = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), ("s", 1)),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), ("s", 60)),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), ("s", 3600)),
    **dict.fromkeys(("d", "day", "days"), ("s", 86400)),
    "ms": ("s", Fraction(1, 1000)),
    "us": ("s", Fraction(1, 1_000_000)),
}
# what a run is measured in: the units of durations and budgets
UNITS: Vocabulary = {
    **TIME,
    **dict.fromkeys(("step", "steps"), ("steps", 1)),
    **dict.fromkeys(("epoch", "epochs"), ("epochs", 1)),
    **dict.fromkeys(("token", "tokens"), ("tokens", 1)),
    **dict.fromkeys(("sample", "samples"), ("samples", 1)),
    **dict.fromkeys(("flop", "flops"), ("flops", 1)),
    "kwh": ("kWh", 1),
    "wh": ("kWh", Fraction(1, 1000)),
    **dict.fromkeys(("$", "usd"), ("$", 1)),
    **dict.fromkeys(("%", "percent"), ("%", 1)),
}
BYTES: Vocabulary = {
    **dict.fromkeys(("b", "byte", "bytes"), ("bytes", 1)),
    **{f"{prefix}b": ("bytes", 1000**power) for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": ("bytes", 1024**power) for power, prefix in enumerate("kmgt", 1)},
}

MAX_CHARACTERS = 40  # of a number: exact arithmetic on a pasted page of digits would take for ever
_DIGITS = "[0-9](?:_?[0-9])*"
_NUMBER = rf"[-+]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?"
_QUANTITY = re.compile(rf"(\$?)\s*({_NUMBER})\s*([A-Za-z%$]*)", re.ASCII)


class UnitError(ValueError):
    """An amount that cannot be read or used. `allowed` is the rule, `hint` the way out, or empty."""

    def __init__(self, allowed: str, hint: str = "") -> None:
        self.allowed, self.hint = allowed, hint
        super().__init__(f"{allowed}; {hint}" if hint else allowed)


def quantity(text: str, units: Vocabulary = UNITS) -> tuple[Fraction, str]:
    """The exact number in the base unit, and that unit: `"2 min"` is `(Fraction(120), "s")`.

    Args:
        text: A number and a unit in any case, or a number alone, whose unit is then empty. `$` stands before.
        units: The units that are legal here: `UNITS`, `TIME` or `BYTES`.

    Raises:
        UnitError: For an unknown unit, text without a number, and numbers beyond a 64-bit float.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if not match or (match[1] and match[3]) or len(match[2]) > MAX_CHARACTERS:
        raise UnitError("a number and a unit")
    unit = (match[1] or match[3]).lower()
    if unit and unit not in units:
        raise UnitError("a number and a unit", did_you_mean(unit, units))
    base, factor = units.get(unit, ("", 1))
    return _exact(match[2]) * factor, base


def _exact(digits: str) -> Fraction:
    rough = float(digits)
    if math.isinf(rough) or abs(rough) > 1e300:
        raise UnitError("a number below 1e300")
    return Fraction(digits) if abs(rough) > 1e-300 else Fraction(0)  # 1e-999999999 would be built digit by digit
