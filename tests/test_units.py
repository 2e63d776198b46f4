"""One vocabulary of amounts: what is legal in one kind of file is legal in all, and is as much there."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest

from shoestring.callbacks.accounting.clock import Duration
from shoestring.cluster.config.sections import LimitsSpec, PreflightSpec
from shoestring.recipes.amounts import amount, duration
from shoestring.trainer.export.compress import CannotExport, Limits
from shoestring.units import BYTES, TIME, UNITS, UnitError, quantity


@pytest.mark.parametrize("unit", TIME)
def test_a_time_is_the_same_wherever_it_is_written(unit: str) -> None:
    text = f"3 {unit.title()}"
    seconds = 3 * TIME[unit][1]
    assert quantity(text) == (seconds, "s")
    assert Duration.parse(text) == Duration(float(seconds), "seconds") == Duration.parse(duration(text))
    assert LimitsSpec(hours=text).hours == amount(text, "s", 3600) == float(Fraction(seconds) / 3600)
    assert Limits.parse(None, text).milliseconds == float(seconds * 1000)


@pytest.mark.parametrize("unit", BYTES)
def test_a_size_is_the_same_wherever_it_is_written(unit: str) -> None:
    text = f"1.5e3 {unit.upper()}"
    assert PreflightSpec(disk=text).disk == Limits.parse(text, None).bytes == 1500 * BYTES[unit][1]


def test_a_size_needs_no_unit() -> None:
    assert PreflightSpec(disk="2000").disk == Limits.parse("2000", None).bytes == 2000


@pytest.mark.parametrize("text", ["5", "5 parsecs", "5 GB", "-5 ms", "0 s", "1e999 s", "ms"])
def test_what_is_no_latency_is_named_with_the_way_out(text: str) -> None:
    with pytest.raises(CannotExport, match=f"--max-latency {text}: write an amount above 0 like 5ms; units: .*us"):
        Limits.parse(None, text)


@pytest.mark.parametrize("text", ["5 GB", "$5 steps", "5 steps a day", "", ".", "1__0 s", f"{'9' * 41} s"])
def test_what_is_no_amount_of_a_run(text: str) -> None:
    with pytest.raises(UnitError):
        quantity(text)


def test_numbers_are_exact() -> None:
    assert quantity("0.1 wh") == (Fraction(1, 10_000), "kWh")
    assert quantity("1_000 samples") == (1000, "samples")
    assert quantity("1e-999999999 s") == (0, "s")
    assert all(unit == unit.lower() for unit in (*UNITS, *BYTES))


def test_the_examples_of_the_docstring() -> None:
    check = "import doctest, shoestring.units as u; raise SystemExit(doctest.testmod(u).failed)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
