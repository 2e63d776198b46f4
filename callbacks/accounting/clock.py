"""One clock for every schedule: what has been spent, and how far along the run is.

What the clock counts
  steps, samples, tokens   work that is part of the trained weights. Steps lost to a crash are done again and counted
                           once here, but their time, money and energy stay spent. Tokens are those of the data:
                           positions that only pad a row are counted apart, as `padding`. `trained_tokens` are those
                           that carry loss; 0 where the task's loss is not over tokens.
  seconds                  wall time of every attempt from the moment `fit` is entered (from process start under the
                           command line) to its end: start-up, steps, waiting for data, evaluation and checkpoints.
  device_seconds, usd      seconds x devices, and that x the price: what a bill counts.
  flops, kwh               executed matrix FLOPs (recomputation included) and energy, summed over ranks.

`progress` in [0, 1] is the share of the run that is done. It is a function of the step and of the recorded horizons
alone, so every rank sees the same value without talking, and replaying the horizons replays the run.

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ... import ShoestringError
from ...units import UNITS, UnitError, quantity
from .forecast import Forecast, first_exhausted

if TYPE_CHECKING:
    import pytorch_lightning as pl

# base unit of an amount -> what the clock counts in it
COUNTS = {
    "s": "seconds", "$": "usd", "kWh": "kwh", "%": "progress",
    **{unit: unit for unit in ("steps", "epochs", "samples", "tokens", "flops")},
}  # fmt: skip
# amounts that differ between ranks and attempts: a schedule may not depend on them directly
MEASURED = frozenset({"seconds", "usd", "kwh", "flops"})


class BadDuration(ShoestringError):
    """A duration that cannot be read."""


@dataclass(frozen=True)
class Duration:
    """An amount of one thing the clock counts, as a schedule's `start` or `until`.

    Args:
        amount: In base units: seconds, US dollars, kWh, FLOPs; for progress a share in [0, 1].
        counts: steps, epochs, samples, tokens, seconds, usd, kwh, flops or progress.

    Example:
        >>> Duration.parse("30 min")
        Duration(amount=1800.0, counts='seconds')
        >>> Duration.parse("40%")  # of the budget
        Duration(amount=0.4, counts='progress')
    """

    amount: float
    counts: str  # steps, epochs, samples, tokens, seconds, usd, kwh, flops or progress

    @classmethod
    def parse(cls, text: str | Duration) -> Duration:
        """An amount from text with a unit, such as "200 steps", "3 epochs", "30 min", "$5" or "40%".

        Raises:
            BadDuration: For anything else; `shoestring/units.py` has all units.
        """
        if isinstance(text, Duration):
            return text
        try:
            number, base = quantity(text) if isinstance(text, str) else (Fraction(), "")
        except UnitError:
            base = ""
        if not base or number < 0:
            raise BadDuration(
                f"{text!r} is not a duration; write a number and one of "
                f"{', '.join(sorted(UNITS))}, as in '200 steps', '30 min', '$5' or '40%'"
            )
        return cls(float(number / 100 if base == "%" else number), COUNTS[base])


@dataclass
class Spend:
    """Cumulative amounts of a run, all ranks and attempts together."""

    steps: float = 0
    samples: float = 0
    tokens: float = 0
    padding: float = 0
    trained_tokens: float = 0
    seconds: float = 0
    device_seconds: float = 0
    usd: float = 0
    flops: float = 0
    flops_counted: float = 0
    kwh: float = 0

    @property
    def device_hours(self) -> float:
        return self.device_seconds / 3600

    def minus(self, other: Spend) -> Spend:
        """Return the spend since `other`."""
        before = other.as_dict()
        return Spend(**{name: amount - before[name] for name, amount in self.as_dict().items()})

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spend:
        return cls(**{f.name: values.get(f.name, 0) for f in fields(cls)})


@dataclass
class Clock:
    """The progress of the run, which every schedule reads. Only the run's account writes it.

    Args:
        spend: What the run has cost so far, all ranks and attempts together.
        limits: As in `Budget`, in the clock's units: usd, seconds, tokens, …
        horizons: Every plan of the end: (from which step, progress there, last step).
        steps_per_epoch: None where there are no epochs.
        step: Finished optimizer steps.
        counted: Tokens and samples as schedules see them (see `count`).
        follows_trainer: In a plain `pl.Trainer`, which counts its own steps.

    Example:
        >>> clock = Clock(step=50)
        >>> clock.replan(0, last=200)
        >>> clock.progress, clock.toward(Duration.parse("50%"))
        (0.25, 0.5)
    """

    spend: Spend = field(default_factory=Spend)
    limits: dict[str, float] = field(default_factory=dict)  # as in Budget: usd, seconds, tokens, …
    horizons: list[tuple[int, float, int]] = field(default_factory=list)  # (from step, progress there, last step)
    steps_per_epoch: float | None = None
    step: int = 0  # finished optimizer steps
    counted: dict[str, float] = field(default_factory=dict)  # tokens and samples as schedules see them: see `count`
    follows_trainer: bool = False  # in a plain `pl.Trainer`, which counts its own steps

    @property
    def horizon(self) -> int | None:
        """The step at which the run ends, as planned now."""
        return self.horizons[-1][2] if self.horizons else None

    def replan(self, step: int, last: int) -> None:
        """From `step` on, plan to end at `last`. Progress stays continuous and never falls."""
        self.horizons.append((step, self.progress_at(step), max(last, step)))

    def end_by_spend(self) -> int:
        """Return the step at which the run would end under its limits if steps keep their cost so far."""
        end = self.first_limit()
        return self.step if end is None else end.last

    def first_limit(self) -> Forecast | None:
        """The limit that ends the run if steps go on to cost what they have cost so far, and where."""
        return first_exhausted(self.limits, {name: getattr(self.spend, name) for name in self.limits}, self.step)

    def stretch(self, last: int) -> None:
        """Another budget: plan as if the run had been meant to end at `last` from its start. Progress may jump."""
        self.horizons = [(0, 0.0, max(last, self.step))]

    def progress_at(self, step: float, seen: float | None = None) -> float:
        """Progress before optimizer step `step` (fractions of a step are allowed), as planned at step `seen` (now)."""
        known = step if seen is None else max(0, min(step, seen))
        for start, there, last in reversed(self.horizons):
            if known >= start:
                if step >= last:
                    return 1.0
                return there + (1.0 - there) * (step - start) / (last - start)
        return 0.0

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        return self.progress_at(self.step)

    def toward(self, duration: Duration, step: float | None = None, seen: float | None = None) -> float:
        """Return the share of `duration` that has passed before `step` (default: now), in [0, 1].

        Who asks ahead of time, as loaders do, gives a step `seen` that has passed whenever it asks: then the answer is
        the same in every rerun, wherever the plan was moved in between.
        """
        step = self.step if step is None else step
        if duration.counts in MEASURED:
            duration = self.as_progress(duration)
        if duration.amount <= 0:
            return 1.0
        done: float
        if duration.counts == "progress":
            done = self.progress_at(step, seen)
        elif duration.counts == "steps":
            done = step
        elif duration.counts == "epochs":
            if not self.steps_per_epoch:
                raise BadDuration("this run has no epochs; give the duration in steps or percent")
            done = step / self.steps_per_epoch
        elif self.follows_trainer:
            raise BadDuration(f"nothing counts {duration.counts} in this trainer; add callbacks=[..., Accountant()]")
        else:
            done = self.counted.get(duration.counts, getattr(self.spend, duration.counts))
        return min(1.0, done / duration.amount)

    def count(self) -> None:
        """Let schedules see the tokens and samples of `spend`: those through the step before, in company and alone.

        Ranks learn their sums a step late, and at once where they save. Always late is the same in every rerun.
        """
        self.counted = {"tokens": self.spend.tokens, "samples": self.spend.samples}

    def as_progress(self, duration: Duration) -> Duration:
        """A measured duration as its share of the budget, on which all ranks agree."""
        limit = self.limits.get(duration.counts)
        if not limit:
            raise BadDuration(
                f"a schedule cannot wait for {duration.counts}: ranks and reruns would disagree. "
                f"Give it in steps, tokens, samples, epochs or percent, or set a budget of {duration.counts}."
            )
        return Duration(duration.amount / limit, "progress")

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for the checkpoint."""
        return {
            "spend": self.spend.as_dict(),
            "limits": dict(self.limits),
            "horizons": [list(h) for h in self.horizons],
            "step": self.step,
            "counted": dict(self.counted),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.spend = Spend.from_dict(state["spend"])
        self.limits = {name: float(limit) for name, limit in state["limits"].items()}
        self.horizons = [(int(a), float(b), int(c)) for a, b, c in state["horizons"]]
        self.step = int(state["step"])
        self.counted = dict(state["counted"])


def clock_of(trainer: pl.Trainer) -> Clock:
    """The clock of this run; a plain `pl.Trainer` gets one that ends at its own `max_steps` or `max_epochs`.

    Args:
        trainer: Of any kind.

    Returns:
        The one clock that all techniques of this trainer read.

    Example:
        >>> import pytorch_lightning as pl
        >>> clock_of(pl.Trainer(max_steps=1000)).horizon
        1000
    """
    clock = getattr(trainer, "_shoestring_clock", None)
    if clock is None:
        clock = Clock(follows_trainer=True)
        trainer._shoestring_clock = clock  # type: ignore[attr-defined]
    if clock.follows_trainer:
        _follow(trainer, clock)
    return clock


def steps_in_epochs(trainer: pl.Trainer, batches: float, epochs: float) -> int:
    """The optimizer steps of the first `epochs`, of so many micro-batches each, also where accumulation changes."""
    from pytorch_lightning.callbacks import GradientAccumulationScheduler

    changing = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    whole = int(epochs)
    if not changing:
        each = -(-int(batches) // trainer.accumulate_grad_batches)
        return whole * each + int((epochs - whole) * each)
    each_of = [-(-int(batches) // changing[0].get_accumulate_grad_batches(epoch)) for epoch in range(whole + 1)]
    return sum(each_of[:whole]) + int((epochs - whole) * each_of[whole])


def _follow(trainer: pl.Trainer, clock: Clock) -> None:
    """Keep the clock of a trainer that is not ours up to date: its step, and the end it was given."""
    clock.step = trainer.global_step
    clock.spend.steps = clock.step
    if clock.horizons:
        return
    batches, epochs = trainer.num_training_batches, max(0, trainer.max_epochs or 0)
    ends = [trainer.max_steps] if trainer.max_steps and trainer.max_steps > 0 else []
    if batches not in (0, float("inf")):
        clock.steps_per_epoch = steps_in_epochs(trainer, batches, max(1, epochs)) / max(1, epochs)
        if epochs:
            ends.append(steps_in_epochs(trainer, batches, epochs))
    if ends:
        clock.horizons = [(0, 0.0, min(ends))]
