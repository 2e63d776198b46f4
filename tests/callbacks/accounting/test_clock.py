"""Durations as people write them, and a progress that no re-planning can turn back."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.callbacks.accounting.clock import COUNTS, BadDuration, Clock, Duration, Spend
from shoestring.units import UNITS

AMOUNTS = st.one_of(st.integers(0, 10**12).map(float), st.floats(1e-6, 1e15))


@pytest.mark.parametrize(
    ("text", "amount", "counts"),
    [
        ("200 steps", 200, "steps"),
        ("1 step", 1, "steps"),
        ("3 epochs", 3, "epochs"),
        ("1.5e9 tokens", 1.5e9, "tokens"),
        ("1_000 samples", 1000, "samples"),
        ("30 min", 1800, "seconds"),
        ("90s", 90, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("1 hr", 3600, "seconds"),
        ("2 days", 172800, "seconds"),
        ("$5", 5, "usd"),
        ("5 USD", 5, "usd"),
        ("$ .5", 0.5, "usd"),
        ("2 kWh", 2, "kwh"),
        ("500 Wh", 0.5, "kwh"),
        ("1e18 flops", 1e18, "flops"),
        ("40%", 0.4, "progress"),
        (" 2.5 % ", 0.025, "progress"),
    ],
)
def test_durations_as_people_write_them(text, amount, counts):
    assert Duration.parse(text) == Duration(pytest.approx(amount), counts)


@given(amount=AMOUNTS, unit=st.sampled_from(sorted(UNITS)), gap=st.sampled_from(["", " ", "  "]), upper=st.booleans())
def test_every_unit_reads_back_as_its_base_unit(amount, unit, gap, upper):
    base, factor = UNITS[unit]
    duration = Duration.parse(f"{amount!r}{gap}{unit.upper() if upper else unit}")
    assert duration == Duration(float(Fraction(repr(amount)) * factor / (100 if base == "%" else 1)), COUNTS[base])
    assert Duration.parse(duration) is duration


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "steps",
        "-5 steps",
        "5 parsecs",
        "$5 usd",
        "$5 steps",
        "5 steps a day",
        "1e-4",
        "nan %",
        "inf s",
        5,
        None,
    ],
)
def test_what_is_no_duration_is_named_with_the_way_out(text):
    with pytest.raises(BadDuration) as error:
        Duration.parse(text)
    assert repr(text) in str(error.value) and "'200 steps'" in str(error.value)


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_an_error_of_ours(text):
    try:
        duration = Duration.parse(text)
    except BadDuration:
        return
    assert duration.amount >= 0 and duration.counts in COUNTS.values()


MOVES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 200)), min_size=1, max_size=12)


@given(MOVES)
def test_progress_is_monotone_and_continuous_whatever_is_replanned(moves):
    clock, step = Clock(), 0
    clock.replan(0, moves[0][1])
    for forward, ahead in moves:
        step = min(step + forward, clock.horizon)
        before = clock.progress_at(step)
        past = [clock.progress_at(s) for s in range(step)]
        clock.replan(step, step + ahead)
        assert clock.progress_at(step) == pytest.approx(before)  # continuous where it is re-planned
        assert past == [clock.progress_at(s) for s in range(step)]  # and what was, stays
    curve = [clock.progress_at(s / 2) for s in range(2 * clock.horizon + 3)]
    assert curve == sorted(curve) and curve[0] >= 0 and curve[-1] == 1.0
    assert clock.progress_at(clock.horizon) == 1.0
    assert clock.progress_at(clock.horizon - 1) < 1.0 or 1.0 in curve[: 2 * step + 1]


@given(MOVES, st.integers(0, 300))
def test_progress_survives_a_checkpoint(moves, at):
    clock, step = Clock(spend=Spend(tokens=7, seconds=1.5), limits={"tokens": 9.0}), 0
    for forward, ahead in moves:
        step += forward
        clock.replan(step, step + ahead)
    clock.step = step
    other = Clock()
    other.load_state_dict(clock.state_dict())
    assert other.progress_at(at) == clock.progress_at(at)
    assert (other.step, other.spend, other.limits) == (clock.step, clock.spend, clock.limits)


def test_the_end_of_the_plan_may_come_at_once():
    clock = Clock()
    assert clock.horizon is None and clock.progress_at(100) == 0.0
    clock.replan(0, 100)
    clock.replan(30, 20)  # the budget is already spent
    assert clock.horizon == 30
    assert clock.progress_at(29) == 0.29 and clock.progress_at(30) == 1.0


def test_another_budget_stretches_the_plan_from_its_start():
    clock = Clock(step=50)
    clock.replan(0, 50)
    assert clock.progress == 1.0
    clock.stretch(200)
    assert clock.progress == 0.25 and clock.progress_at(200) == 1.0
    clock.stretch(10)  # less than is spent
    assert clock.progress == 1.0 and clock.horizon == 50


def test_toward_measures_any_duration_on_the_same_clock():
    clock = Clock(step=20, steps_per_epoch=40, limits={"usd": 8.0, "seconds": 50.0})
    clock.replan(0, 80)
    clock.spend.tokens, clock.spend.samples = 300, 30
    expected = {
        "40 steps": 0.5, "1 epoch": 0.5, "0.25 epochs": 1.0, "1200 tokens": 0.25, "120 samples": 0.25,
        "50%": 0.5, "25%": 1.0, "0%": 1.0, "0 steps": 1.0, "$4": 0.5, "25 s": 0.5, "100 s": 0.125,
    }  # fmt: skip
    assert {text: clock.toward(Duration.parse(text)) for text in expected} == expected
    assert clock.toward(Duration.parse("40 steps"), 10) == 0.25
    assert clock.toward(Duration.parse("50%"), 4) == 0.1


def test_toward_refuses_what_ranks_or_reruns_would_disagree_on():
    clock = Clock(step=1)
    with pytest.raises(BadDuration, match=r"cannot wait for seconds.*set a budget of seconds"):
        clock.toward(Duration.parse("30 min"))
    with pytest.raises(BadDuration, match="no epochs"):
        clock.toward(Duration.parse("1 epoch"))


def test_device_hours_are_seconds_times_devices():
    assert Spend(device_seconds=7200).device_hours == 2.0
    assert Spend.from_dict({"steps": 3, "unknown": 1}) == Spend(steps=3)
