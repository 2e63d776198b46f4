"""A budget ends a run when it is spent: in ten thousand simulated runs, and in real ones of a few seconds."""

import json
import math
import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import pytest
import pytorch_lightning as pl
import torch
from budgeted import Sentences, fit_all
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import run as run_ranks
from small import QUIET, Small, loader, rate, train
from torch.utils.data import DataLoader

from shoestring.callbacks import SequenceLengthWarmup
from shoestring.callbacks.accounting.budget import Budget, Guard, ImpossibleBudget
from shoestring.callbacks.accounting.clock import Clock
from shoestring.cluster.config.hardware import hardware
from shoestring.trainer.ledger import read

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

SUMMED = {"samples", "tokens", "flops", "kwh"}


# -- the ceilings ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "5", None])
def test_a_limit_is_a_positive_number(value):
    if value is None:
        assert not Budget(usd=None)
        return
    with pytest.raises(ImpossibleBudget, match=r"usd=.*a limit is a positive number"):
        Budget(usd=value)


def test_there_is_no_part_of_a_step():
    with pytest.raises(ImpossibleBudget, match=r"steps=0\.5: it must be at least 1"):
        Budget(steps=0.5)


def test_limits_are_in_the_clocks_units():
    assert Budget(hours=0.5, device_hours=2, steps=7).limits() == {"seconds": 1800, "device_hours": 2, "steps": 7}
    assert Budget(tokens=5) and Budget(tokens=5).given() == {"tokens": 5}


# -- simulated runs ----------------------------------------------------------------------------------------------------
@dataclass
class Simulation:
    """A run as an account leads it, with costs from a function instead of a machine.

    `cost(step, progress)` -> what the step costs. With `lag` 1 the ranks' sums and the guard's word are heard a step
    late, but for the first step. `pauses` are those of the guard; `tail` seconds follow the last step.
    """

    limits: dict
    cost: object
    lag: int = 0
    pauses: dict = field(default_factory=dict)
    tail: float = 0.0
    startup: float = 0.0
    clock: Clock = field(default_factory=Clock)
    guard: Guard | None = None
    costs: list = field(default_factory=list)

    def __post_init__(self):
        self.guard = self.guard or Guard(self.limits, self.lag)
        self.guard.reserve_seconds, self.guard.pauses = self.tail, dict(self.pauses)
        self.clock.limits = self.limits
        self.spent = self.clock.spend.as_dict()  # the truth; the clock knows of sums only what was heard
        self._spend({"seconds": self.startup, "usd": self.startup * 2, "kwh": self.startup / 1e3})
        self.guard.skip(self.clock)

    def _spend(self, amounts, hears=frozenset(SUMMED)):
        for name, amount in amounts.items():
            self.spent[name] += amount
        for name in self.spent:
            if name not in SUMMED - hears:
                setattr(self.clock.spend, name, self.spent[name])

    def run(self, most=20_000):
        vote = 0
        while self.clock.step < most:
            known = {name: self.spent[name] for name in SUMMED}
            step_cost = self.cost(self.clock.step, self.clock.progress)
            self.costs.append(step_cost)
            first = self.clock.step == 0
            self._spend({**step_cost, "steps": 1}, frozenset() if self.lag and not first else frozenset(SUMMED))
            self.clock.step += 1
            if self.lag and not first:
                for name, value in known.items():
                    setattr(self.clock.spend, name, value)
                self._follow(vote)
            self.guard.lag = 0 if first else self.lag
            self.guard.observe(self.clock)
            vote = self.guard.decide(self.clock) or 0
            if first or not self.lag:
                self._follow(vote)
            self.guard.lag = self.lag
            if self.clock.horizon is not None and self.clock.step >= self.clock.horizon:
                break
            for every, seconds in self.pauses.values():
                if self.clock.step % every == 0:
                    self._spend({"seconds": seconds, "usd": seconds * 2, "kwh": seconds / 1e3}, frozenset())
                    self.guard.skip(self.clock)
        self._spend({"seconds": self.tail, "usd": self.tail * 2, "kwh": self.tail / 1e3})
        return self

    def _follow(self, last):
        if last and last != self.clock.horizon:
            self.clock.replan(self.clock.step, last)

    @property
    def dearest(self):
        return max(cost[name] for cost in self.costs for name in [next(iter(self.limits))])


def few(steps):
    """How many re-plans are few: some at the start, one each time what remains has shrunk by a fifth, the last mile."""
    return 12 + math.log(steps + 1) / math.log(1 / Guard.REPLAN_DECAY)


@given(
    name=st.sampled_from(["tokens", "samples", "flops"]),
    each=st.integers(1, 10**9),
    steps=st.floats(1.0, 500.0),
    lag=st.sampled_from([0, 1]),
)
def test_a_constant_cost_is_planned_once_and_met_exactly(name, each, steps, lag):
    limit = each * steps
    run = Simulation({name: limit}, lambda *_: {name: each}, lag).run()
    assert run.spent[name] <= limit < run.spent[name] + each * (1 + 1e-9)
    assert run.clock.progress == 1.0
    assert len(run.clock.horizons) == 1


@given(
    length=st.integers(16, 128),
    jump=st.integers(1, 8),
    until=st.floats(0.1, 0.9),
    steps=st.floats(12.0, 800.0),
    lag=st.sampled_from([0, 1]),
)
@example(length=16, jump=1, until=0.9, steps=800.0, lag=1)
def test_a_growing_sequence_length_never_overspends_tokens(length, jump, until, steps, lag):
    """Length warmup: the cost is a staircase in the progress, which depends on the plan."""
    start, batch, jump = length // 8, 8, min(jump, length // 8)

    def tokens(step, progress):
        ramp = min(1.0, progress / until)
        grown = start + int(ramp * (length - start) / jump) * jump
        return {"tokens": batch * (length if ramp >= 1 else grown)}

    limit = batch * length * steps
    run = Simulation({"tokens": limit}, tokens, lag).run()
    assert run.spent["tokens"] <= limit
    rise = max(after["tokens"] - before["tokens"] for before, after in pairwise(run.costs))
    assert run.spent["tokens"] >= limit - (2 + lag) * (run.dearest + (1 + 2 * lag) * rise)
    assert run.clock.progress == 1.0
    assert len(run.clock.horizons) <= few(run.clock.step)


@given(
    mean=st.floats(0.01, 10.0),
    jitter=st.floats(0.0, 0.5),
    steps=st.floats(12.0, 700.0),
    lag=st.sampled_from([0, 1]),
    unit=st.sampled_from(["seconds", "usd", "kwh"]),
    tail=st.floats(0.0, 3.0),
    warm=st.floats(1.0, 3.0),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50)
def test_a_noisy_cost_overspends_at_most_the_noise_of_one_step(mean, jitter, steps, lag, unit, tail, warm, seed):
    draw, per_second = random.Random(seed), {"seconds": 1.0, "usd": 2.0, "kwh": 1e-3}[unit]

    def cost(step, progress):
        seconds = mean * (1 + jitter * draw.uniform(-1, 1)) * (warm if step == 0 else 1)
        return {"seconds": seconds, "usd": seconds * 2, "kwh": seconds / 1e3}

    tail *= mean
    limit = (mean * (steps + warm) + tail + mean) * per_second
    run = Simulation({unit: limit}, cost, lag, tail=tail, startup=mean).run()
    one, noise = mean * per_second, 2 * jitter * mean * per_second
    assert run.spent[unit] <= limit * (1 + 1e-9) + noise * (1 + lag)
    assert run.spent[unit] > limit - (2 + lag) * (one + noise)
    assert run.clock.progress == 1.0
    assert len(run.clock.horizons) <= few(run.clock.step)


@given(
    every=st.integers(2, 60),
    seconds=st.integers(1, 120).map(lambda quarters: quarters / 4),
    steps=st.integers(20, 400),
    lag=st.sampled_from([0, 1]),
)
@example(every=10, seconds=30.0, steps=199, lag=0)
def test_evaluations_on_the_way_are_planned_for_and_never_overspend(every, seconds, steps, lag):
    """An evaluation due just before the end would cost more than what remains: the run ends before it, or at it."""
    limit = steps * 1.0 + seconds
    pauses = {"evaluation": (every, seconds)}
    run = Simulation({"seconds": limit}, lambda *_: {"seconds": 1.0}, lag, pauses, tail=seconds).run()
    assert run.spent["seconds"] <= limit + 1e-6
    assert run.spent["seconds"] > limit - 2 - lag - seconds
    assert len(run.clock.horizons) <= 2  # known from the start
    assert run.clock.progress == 1.0


def test_the_first_limit_reached_ends_the_run():
    cost = {"seconds": 2.0, "usd": 1.0, "tokens": 100.0, "samples": 10.0}
    for name, limit in {"seconds": 40.0, "usd": 20.0, "tokens": 2000.0, "samples": 200.0}.items():
        limits = {"seconds": 100.0, "usd": 100.0, "tokens": 1e4, "samples": 1e3, "steps": 50.0} | {name: limit}
        run = Simulation(limits, lambda *_: cost).run()
        assert (run.clock.step, run.guard.forecast(run.clock).binding) == (20, name)
    run = Simulation({"seconds": 100.0, "steps": 7.0}, lambda *_: cost).run()
    assert run.clock.step == 7


def test_a_slow_first_step_does_not_set_the_forecast():
    run = Simulation({"seconds": 110.0}, lambda step, _: {"seconds": 10.0 if step == 0 else 1.0})
    assert run.run().clock.step == 101
    assert run.clock.horizons[0] == (1, 0.0, 11) and run.clock.horizons[1][2] == 101


def test_the_machine_may_become_slower_for_good():
    run = Simulation({"seconds": 1000.0}, lambda step, _: {"seconds": 1.0 if step < 300 else 3.0}).run()
    assert 995 < run.spent["seconds"] <= 1000
    assert len(run.clock.horizons) <= few(run.clock.step)


def test_a_resumed_run_decides_as_if_it_had_not_been_interrupted():
    def tokens(step, progress):
        return {"tokens": 8 * (16 + int(min(1, progress / 0.8) * 48))}

    whole = Simulation({"tokens": 60_000.0}, tokens).run()
    first = Simulation({"tokens": 60_000.0}, tokens).run(most=57)
    guard = Guard(first.limits)
    guard.load_state_dict(first.guard.state_dict())
    clock = Clock()
    clock.load_state_dict(first.clock.state_dict())
    second = Simulation(first.limits, tokens, clock=clock, guard=guard).run()
    assert second.clock.horizons == whole.clock.horizons
    assert second.spent["tokens"] == whole.spent["tokens"]


# -- real runs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ({"steps": 11}, 11),
        ({"samples": 50}, 12),  # four a step
        ({"tokens": 700}, 10),  # 64 a step
        ({"flops": 1050}, 8),  # forward and gradient of 8 weights for 4 samples: 128
        ({"tokens": 700, "samples": 20}, 5),
        ({"steps": 11, "flops": 1e9}, 11),
    ],
)
def test_counted_budgets_end_exactly_and_annealed(tmp_path, limit, steps):
    data = DataLoader(Sentences(), 4, shuffle=True) if "tokens" in limit else loader()
    trainer = train(tmp_path, Budget(**limit), data=data, validation=loader(8, shuffle=False))
    summary = trainer.summary
    assert summary["steps"] == trainer.global_step == steps
    spent = {"steps": steps, "samples": 4 * steps, "tokens": 64 * steps, "flops": summary["flops_realised"]}
    assert all(spent[name] <= ceiling for name, ceiling in limit.items())
    assert summary["samples"] == 4 * steps and summary["flops_realised"] == 128 * steps
    assert rate(trainer) == 0.0 and trainer.monitor.account.clock.progress == 1.0
    assert summary["stopped_by"] == min(limit, key=lambda name: limit[name] / spent[name])
    assert "val_loss" in summary["metrics"]
    assert len(trainer.monitor.account.clock.horizons) == 1


PAUSE = 0.04


class Recorder(pl.Callback):
    """What had been set aside before the last step. A busy machine may need more, and longer for a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.reserve = trainer.monitor.account.horizon.guard.reserve_seconds

    def slack(self, trainer):
        """(seconds that may be left, seconds that may be overspent): a step, and what could not be foreseen."""
        rows = read(Path(trainer.summary["run_dir"]) / "events")
        last = max(row.fields["seconds"] for row in rows if row.kind == "step" and "seconds" in row.fields)
        surprise = trainer.summary["seconds"] - last - self.reserve  # after the last step
        steps = sorted(trainer.monitor.account.horizon.guard._costs["seconds"])
        noise = steps[-1] - steps[len(steps) // 2]
        return 2 * steps[-1] + noise + max(0.0, -surprise), noise + max(0.0, surprise) + 1e-3


@pytest.mark.parametrize(
    ("budget", "options", "unit"),
    [
        (Budget(hours=1.6 / 3600), {}, "seconds"),
        (Budget(usd=1.6), {"usd_per_device_hour": 3600.0}, "usd"),
        (Budget(kwh=1.6e-4), {"watts_per_device": 1000.0}, "kwh"),
        (Budget(device_hours=1.2 / 3600), {}, "device_seconds"),
    ],
    ids=["seconds", "dollars", "kwh", "device-hours"],
)
def test_measured_budgets_end_within_a_step_with_the_last_evaluation_and_checkpoint_inside(
    tmp_path, budget, options, unit
):
    recorder, validation = Recorder(), loader(16, shuffle=False)
    trainer = train(
        tmp_path, budget, module=Small(PAUSE), data=loader(1024), validation=validation, callbacks=[recorder], **options
    )
    summary = trainer.summary
    limit = {"seconds": 1.6, "usd": 1.6, "kwh": 1.6e-4, "device_seconds": 1.2}[unit]
    under, over = (seconds * summary[unit] / summary["seconds"] for seconds in recorder.slack(trainer))
    if unit == "kwh":  # the power is not the same at all times
        under, over = under + 0.05 * limit, over + 0.05 * limit
    assert limit - under < summary[unit] <= limit + over
    assert rate(trainer) == 0.0 and trainer.monitor.account.clock.progress == 1.0
    assert 0.8 * trainer.wall < summary["seconds"] <= trainer.wall  # nothing that was waited for is left out
    # the whole evaluation, unless this machine was slow just then: then what is left out is said
    cut = [row.fields["batches"] for row in read(tmp_path / "events") if row.fields.get("event") == "evaluation_cut"]
    assert summary["windows"]["evaluation"] > min([4, *cut]) * PAUSE and summary["windows"]["checkpoint"] > 0
    assert (tmp_path / "checkpoints" / f"{summary['steps']:09d}").is_dir() and summary["metrics"]
    assert len(trainer.monitor.account.clock.horizons) <= few(summary["steps"])


def test_no_evaluation_is_begun_that_would_leave_no_time_for_another_at_the_end(tmp_path):
    """Four steps an epoch, and an evaluation after each that takes as long as eight."""
    recorder = Recorder()
    trainer = train(
        tmp_path, Budget(hours=1.2 / 3600), module=Small(PAUSE), data=loader(16), validation=loader(32, shuffle=False),
        callbacks=[recorder],
    )  # fmt: skip
    assert trainer.summary["seconds"] <= 1.2 + recorder.slack(trainer)[1]
    assert trainer.summary["windows"]["evaluation"] > 8 * PAUSE and rate(trainer) == 0.0


def test_spend_survives_a_crash_and_the_budget_holds_for_all_attempts_together(tmp_path):
    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 7:
                raise RuntimeError("crashed")

    budget, recorder = Budget(hours=1.8 / 3600, usd=10.0), Recorder()
    options = {"usd_per_device_hour": 3600.0, "validation": loader(8, shuffle=False), "data": loader(1024)}
    began = perf_counter()
    with pytest.raises(RuntimeError, match="crashed"):
        train(tmp_path, budget, module=Small(PAUSE), callbacks=[Crash()], checkpoint_every="3 steps", **options)
    first = perf_counter() - began
    trainer = train(tmp_path, budget, module=Small(PAUSE), callbacks=[recorder], **options)
    summary, (under, over) = trainer.summary, recorder.slack(trainer)
    assert summary["resumed_from"] == 6
    assert 0.8 * (first + trainer.wall) < summary["seconds"] <= first + trainer.wall
    assert 1.8 - under < summary["seconds"] <= 1.8 + over
    assert summary["usd"] == pytest.approx(summary["seconds"])
    assert rate(trainer) == 0.0
    # a step was done twice: its time stays spent, its samples count once
    assert summary["samples"] == 4 * summary["steps"]


def test_a_run_resumed_under_a_token_budget_is_the_same_run(tmp_path):
    """The guard's memory is saved too: with growing sequences its decisions depend on what steps cost before."""

    def fit(folder, **options):
        return train(
            tmp_path / folder, Budget(tokens=1500), data=DataLoader(Sentences(), 4, shuffle=True),
            techniques=[SequenceLengthWarmup(start=8, until="80%", multiple=1)], **options,
        )  # fmt: skip

    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 17:
                raise RuntimeError("crashed")

    whole = fit("whole")
    with pytest.raises(RuntimeError, match="crashed"):
        fit("parts", callbacks=[Crash()], checkpoint_every="6 steps")
    resumed = fit("parts")
    assert resumed.monitor.resumed_from == 12
    assert resumed.monitor.account.clock.horizons == whole.monitor.account.clock.horizons
    assert 1400 < resumed.summary["tokens"] == whole.summary["tokens"] <= 1500
    assert torch.equal(resumed.lightning_module.net.weight, whole.lightning_module.net.weight)


def test_a_budget_that_cannot_be_counted_is_refused(tmp_path):
    with pytest.raises(ImpossibleBudget, match=r"tokens=100.*no 'input_ids'.*Use a budget of samples or steps"):
        train(tmp_path / "a", Budget(tokens=100))
    with pytest.raises(ImpossibleBudget, match="usd=5 needs a price: give usd_per_device_hour"):
        train(tmp_path / "b", Budget(usd=5), usd_per_device_hour=0.0)


def test_dollars_have_the_catalogues_price_unless_given(tmp_path):
    trainer = train(tmp_path, Budget(steps=2, usd=1000.0))
    seconds = trainer.summary["device_seconds"]
    assert trainer.summary["usd"] == pytest.approx(seconds / 3600 * hardware("cpu").usd_per_hour)


def test_two_ranks_stop_at_the_same_step_within_the_budget_of_both(tmp_path):
    """Sums and decisions are heard a step late; what is counted still ends exactly, planned once."""
    assert run_ranks(fit_all, tmp_path, world=2, folder=tmp_path) == [0, 0]
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for name, report in one.items():
        same = ("steps", "samples", "tokens", "stopped_by", "horizons", "rate", "flops_realised")
        assert {key: report[key] for key in same} == {key: two[name][key] for key in same}
        assert report["rate"] == 0.0
    assert (one["tokens"]["steps"], one["tokens"]["tokens"], one["tokens"]["stopped_by"]) == (21, 1344, "tokens")
    assert (one["samples"]["steps"], one["samples"]["samples"], one["samples"]["stopped_by"]) == (12, 48, "samples")
    assert one["tokens"]["horizons"] == [[1, 0.0, 21]] and one["samples"]["horizons"] == [[1, 0.0, 12]]
    assert 2800 < one["growing"]["tokens"] <= 3000 and len(one["growing"]["horizons"]) <= few(60)
    for name, limit in (("seconds", 1.2), ("dollars", 1.2)):  # two devices at a dollar a second
        assert limit / 2 < one[name]["seconds"] < limit + 0.3, "not even roughly"
        assert one[name]["usd"] == pytest.approx(2 * one[name]["seconds"])


# -- epochs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limits", "steps", "binding"),
    [
        ({"epochs": 2}, 10, "epochs"),
        ({"epochs": 0.5}, 2, "epochs"),
        ({"epochs": 1.3}, 6, "epochs"),
        ({"epochs": 2, "steps": 7}, 7, "steps"),
        ({"epochs": 1, "samples": 100}, 5, "epochs"),
        ({"epochs": 9, "samples": 16}, 4, "samples"),
    ],
    ids=str,
)
def test_a_budget_in_epochs_ends_the_run_annealed(tmp_path, limits, steps, binding):
    """Five steps an epoch."""
    trainer = train(tmp_path, Budget(**limits), data=loader(20))
    assert (trainer.summary["steps"], trainer.summary["stopped_by"]) == (steps, binding)
    assert trainer.summary["epochs"] == steps / 5 and rate(trainer) == 0.0
    assert trainer.monitor.account.clock.horizon == steps


def test_more_epochs_stretch_the_run(tmp_path):
    train(tmp_path, Budget(epochs=1), data=loader(20))
    trainer = train(tmp_path, Budget(epochs=1.6), data=loader(20))
    assert (trainer.summary["resumed_from"], trainer.summary["steps"], rate(trainer)) == (5, 8, 0.0)


def test_epochs_need_data_with_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(20, 8))

    with pytest.raises(ImpossibleBudget, match=r"budget epochs=2: this loader has no length\. Use a budget of steps"):
        train(tmp_path, Budget(epochs=2), data=torch.utils.data.DataLoader(Stream(), 4))
