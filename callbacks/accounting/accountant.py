"""The run's one observer: keeps the clock, measures every step, and ends the run when the budget ends.

It is the last callback, so at the end of a batch it sees what every technique has done. `shoestring.trainer` extends it
with the journal, checkpoints and signals; in anybody's trainer it stands alone:

    pl.Trainer(max_epochs=-1, callbacks=[LRSchedule(), Accountant(Budget(hours=2))])
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import pytorch_lightning as pl

from ..contract import Technique, silence
from .agreement import Agreement
from .budget import Budget, Guard, ImpossibleBudget, refuse_uncounted
from .clock import Clock, Spend
from .energy import EnergyMeter, SteadyEnergy
from .flops import StepFlops
from .meter import EvaluationTimer, Windows, batch_size, whole_batches

# what each rank adds to the exchanged vector
SIGNAL, HORIZON, SAVE, SAMPLES, TOKENS, COUNTED, REALISED, JOULES = range(8)


@silence
class Accountant(pl.Callback):
    """Counts what a run spends and stops it at the budget's end, on every rank at the same step.

    `usd_per_device_hour` prices the run; `watts_per_device` estimates energy where no counter can be read.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        usd_per_device_hour: float = 0.0,
        watts_per_device: float | None = None,
        count_flops: bool = True,
        startup_seconds: float = 0.0,
    ) -> None:
        self.budget = budget or Budget()
        self.usd_per_device_hour = usd_per_device_hour
        self.watts_per_device = watts_per_device
        self.count_flops = count_flops
        self.clock = Clock()
        self.windows = Windows()
        self.windows.seconds["startup"] = startup_seconds
        self.stopped_by: str | None = None
        self.closing_seconds = 0.0  # what comes after the final evaluation
        self.evaluation_cut = False  # the budget ended it
        self.evaluation = EvaluationTimer()
        self.data_wait = 0.0
        self._local = [0.0] * 8
        self._signal = 0.0  # this rank has been asked to stop
        self.signalled = False  # some rank has, and all ranks know it
        self.save_due = False  # rank 0 wants a checkpoint, and all ranks know it
        self._first = True
        self._guard_state: dict[str, Any] | None = None
        self._batch_ended = perf_counter()
        if self.budget.usd is not None and not usd_per_device_hour:
            raise ImpossibleBudget(f"budget usd={self.budget.usd:g} needs a price: give usd_per_device_hour")

    # -- start ------------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer._shoestring_clock = self.clock  # type: ignore[attr-defined]
        self.agreement = Agreement(len(self._local))
        self.world = trainer.world_size
        self.energy = SteadyEnergy(EnergyMeter(self.watts_per_device, 1), self.windows.total())
        self._base = self.clock.spend
        masked = [c for c in trainer.callbacks if isinstance(c, Technique) and hasattr(c, "densities")]
        self._flops = StepFlops(pl_module, masked)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._base = Spend.from_dict(self.clock.spend.as_dict())
        self.set_limits(trainer, trainer.num_training_batches)
        self.refresh()
        self.guard.skip(self.clock)
        self._batch_ended = self.windows.enter("train")

    def set_limits(self, trainer: pl.Trainer, batches: float) -> None:
        """Tell the clock what ends the run; `batches` are the micro-batches of an epoch. Again changes nothing."""
        limits = self.budget.limits()
        ends = [limits["steps"]] if "steps" in limits else []
        if batches not in (0, float("inf")):
            self.clock.steps_per_epoch = -(-int(batches) // trainer.accumulate_grad_batches)
            if trainer.max_epochs and trainer.max_epochs > 0:
                ends.append(trainer.max_epochs * self.clock.steps_per_epoch)
        if trainer.max_steps and trainer.max_steps > 0:
            ends.append(trainer.max_steps)
        if ends:
            limits["steps"] = min(ends)
        before, self.clock.limits = self.clock.limits, limits
        self.guard = Guard(limits, self.agreement.lag)
        if self.clock.horizons and before != limits:
            self._guard_state = None
            self.clock.stretch(self.clock.end_by_spend())
            self.on_replan(self.clock.step, self.clock.horizons[-1][2])
        elif self._guard_state:
            self.guard.load_state_dict(self._guard_state)
        if "steps" in limits and not self.clock.horizons:
            self.clock.replan(0, int(limits["steps"]))

    # -- the step ---------------------------------------------------------------------------------------------------
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.data_wait += perf_counter() - self._batch_ended
        samples, tokens, shape = batch_size(batch)
        self._local[SAMPLES] += samples
        self._local[TOKENS] += tokens
        if self.count_flops:
            self._flops.begin(shape, self._steps_after(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.count_flops:
            flops = self._flops.end()
            self._local[COUNTED] += flops.counted
            self._local[REALISED] += flops.realised
        if self._steps_after(trainer, batch_idx):
            self.clock.step += 1
            self._account(trainer)
            self.on_step(trainer, pl_module, outputs)
        self._batch_ended = perf_counter()

    @staticmethod
    def _steps_after(trainer: pl.Trainer, batch_idx: int) -> bool:
        """Whether the optimizer steps after this micro-batch; the last one of an epoch ends a partial window."""
        return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch

    def _account(self, trainer: pl.Trainer) -> None:
        """Exchange counters and decisions, and stop where the plan ends."""
        clock, local = self.clock, self._local
        local[SIGNAL] = self._signal
        self.refresh()
        if self._first:
            clock.count()
            self._begin(trainer)
        else:
            self._hear(self.agreement.settle())
            clock.count()
            if self.world == 1:
                self._hear(local)
            if trainer.is_global_zero:
                self.guard.observe(clock)
                local[HORIZON] = self.guard.decide(clock) or 0
            self.agreement.start(local)
            if self.world == 1:
                self._follow(local[HORIZON])
        if clock.horizon is not None and clock.step >= clock.horizon and not trainer.should_stop:
            forecast = self.guard.forecast(clock)
            self.stopped_by = forecast.binding if forecast else "steps"
            trainer.should_stop = True

    def _begin(self, trainer: pl.Trainer) -> None:
        """After the first step of an attempt ranks wait for one another once, so that all know the horizon."""
        self._first = False
        self._hear(self.agreement.now(self._local))
        refuse_uncounted(self.clock.limits, self.this_attempt())
        vote = 0
        self.guard.lag = 0
        if trainer.is_global_zero:
            self.guard.observe(self.clock)
            self.set_aside(trainer)
            vote = self.guard.decide(self.clock) or 0
        self.guard.lag = self.agreement.lag
        self._follow(self.agreement.now([float(vote)])[0])

    def _hear(self, sums: list[float] | None) -> None:
        if sums is None:
            return
        spend, base = self.clock.spend, self._base
        spend.samples = base.samples + sums[SAMPLES]
        spend.tokens = base.tokens + sums[TOKENS]
        spend.flops_counted = base.flops_counted + sums[COUNTED]
        spend.flops = base.flops + sums[REALISED]
        spend.kwh = base.kwh + sums[JOULES] / 3.6e6
        if sums[HORIZON] < 0:
            self.evaluation_cut = True
        elif self.world > 1:
            self._follow(sums[HORIZON])
        self.signalled = self.signalled or sums[SIGNAL] > 0
        self.save_due = self.save_due or sums[SAVE] > 0

    def _follow(self, last: float) -> None:
        if last and last != self.clock.horizon:
            self.clock.replan(self.clock.step, int(last))
            self.on_replan(self.clock.step, int(last))

    def refresh(self, *, exact: bool = False) -> None:
        """Bring the spend that this process measures itself up to now; energy `exact`ly, or as last known."""
        spend, base = self.clock.spend, self._base
        elapsed = self.windows.total()
        spend.steps = self.clock.step
        spend.seconds = base.seconds + elapsed
        spend.device_seconds = base.device_seconds + elapsed * self.world
        spend.usd = base.usd + elapsed * self.world * self.usd_per_device_hour / 3600
        self._local[JOULES] = self.energy.at(elapsed, exact=exact)

    def this_attempt(self) -> Spend:
        """What this attempt has spent."""
        return self.clock.spend.minus(self._base)

    # -- pauses -----------------------------------------------------------------------------------------------------
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":  # `trainer.validate` is no part of the run
            return
        self.evaluation.begin(self.windows.enter("evaluation"))
        self.evaluation_cut = False

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self.evaluation.batch()
        if trainer.sanity_checking:
            return
        self._local[SIGNAL], self._local[SAVE] = self._signal, 0
        self._local[HORIZON] = -1 if trainer.is_global_zero and self._money_is_out() else 0
        self._hear(self.agreement.exchange(self._local))
        if self.evaluation_cut:
            raise StopIteration  # Lightning ends the evaluation with what it has seen

    def _money_is_out(self) -> bool:
        """Whether another evaluation batch would go over a limit, for a reserve that turned out too small."""
        self.refresh()
        ahead = (1 + self.agreement.lag) * self.evaluation.mean() + self.closing_seconds
        return self.guard.is_overrun(self.clock, ahead)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        now = self.windows.enter("startup" if trainer.sanity_checking else "train")
        self.evaluation.end(now, whole_batches(trainer.num_val_batches))
        if not trainer.sanity_checking:
            self.pause_ended(trainer)

    def pause_ended(self, trainer: pl.Trainer) -> None:
        """What happened since the last step was not the cost of a step."""
        self.refresh()
        self.guard.skip(self.clock)
        self.set_aside(trainer)
        self._batch_ended = perf_counter()

    def set_aside(self, trainer: pl.Trainer) -> None:
        """Tell the guard which pauses are to come, and what comes after the last step."""
        if not trainer.enable_validation:
            return
        seconds = self.evaluation.seconds
        if not seconds:  # none has run yet: a batch costs at most what training on one costs
            micro = self.guard.step_seconds() / trainer.accumulate_grad_batches
            seconds = micro * whole_batches(trainer.num_val_batches)
        self.guard.reserve_seconds = seconds
        self.guard.pauses["evaluation"] = (self.evaluation_interval(trainer), seconds)

    def evaluation_interval(self, trainer: pl.Trainer) -> float:
        """Steps between evaluations, as Lightning was told; infinity if the only one is at the end."""
        batches, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch or 1
        if batches is None or batches == float("inf"):
            return (self.clock.steps_per_epoch or float("inf")) * epochs
        return max(1.0, batches * epochs / trainer.accumulate_grad_batches)

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model has other shapes now (see callbacks/parameters/reshape.py): its steps cost something else."""
        self._flops.forget()
        self.pause_ended(trainer)

    # -- end --------------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.windows.enter("other")
        self._local[SIGNAL] = self._local[HORIZON] = self._local[SAVE] = 0
        self.refresh(exact=True)
        self.agreement.settle()
        self._hear(self.agreement.now(self._local))
        self.refresh()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_flops"):
            self._flops.abort()

    # -- for the trainer's extension ---------------------------------------------------------------------------------
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any) -> None:
        """An optimizer step has ended and is accounted for."""

    def on_replan(self, step: int, last: int) -> None:
        """The end of the run has moved."""

    # -- state -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        guard = self.guard.state_dict() if hasattr(self, "guard") else None
        return {"clock": self.clock.state_dict(), "evaluation_seconds": self.evaluation.seconds, "guard": guard}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.load_state_dict(state_dict["clock"])
        self.evaluation.seconds = state_dict["evaluation_seconds"]
        self._guard_state = state_dict["guard"]
