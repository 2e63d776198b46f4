"""One rule for which limit ends a run first, whoever asks: a plan, a run under way, a run that is resumed."""

import pytest

from shoestring.callbacks.accounting.budget import Budget, Guard
from shoestring.callbacks.accounting.clock import Clock, Spend
from shoestring.callbacks.accounting.forecast import Forecast, first_end, first_exhausted
from shoestring.trainer.planning.predictions import costs, whole_run


@pytest.mark.parametrize(
    ("budget", "end"),
    [
        ({"tokens": 640, "steps": 90}, Forecast(80, "tokens")),
        ({"tokens": 640, "steps": 80}, Forecast(80, "tokens")),  # the one named first where both end it
        ({"hours": 0.25, "usd": 100}, Forecast(450, "seconds")),
        ({"usd": 0.5, "device_hours": 2}, Forecast(225, "usd")),
        ({"samples": 9}, None),  # nobody counts them
    ],
    ids=str,
)
def test_whoever_asks_hears_the_same(budget, end):
    """Steps of 8 tokens and 2 s on two devices at $2 an hour."""
    step = {"steps": 1.0, "tokens": 8.0, **costs(2.0, 2, 2.0, None)}
    limits = Budget(**budget).limits()
    assert first_exhausted(limits, step) == end
    clock, guard = Clock(limits=limits), Guard(limits)
    for clock.step in range(31):
        clock.spend = Spend(
            steps=clock.step, tokens=8 * clock.step, seconds=2 * clock.step, device_seconds=4 * clock.step,
            usd=step["usd"] * clock.step,
        )  # fmt: skip
        guard.observe(clock)
    assert clock.first_limit() == end and clock.end_by_spend() == (end.last if end else clock.step)
    assert guard.forecast(clock) == end
    planned = whole_run(Budget(**budget), step)
    spelled = {"seconds": "hours"}  # as in a recipe
    assert planned.get("steps") == (end.last if end else None)
    assert planned.get("binding") == (spelled.get(end.binding, end.binding) if end else None)


def test_a_limit_of_steps_holds_before_the_first():
    assert first_exhausted({"steps": 70, "usd": 1.0}, {}, 0) == Forecast(70, "steps")
    assert first_end({}) is None
