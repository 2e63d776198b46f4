"""The run's one observer: keeps the clock, measures every step, and ends the run when the budget ends.

It is the last callback, so at the end of a batch it sees what every technique has done. `shoestring.trainer` extends it
with the journal, checkpoints and signals; in anybody's trainer it stands alone:

    pl.Trainer(max_epochs=-1, callbacks=[LRSchedule(), Accountant(Budget(hours=2))])
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch

from .agreement import Agreement
from .budget import Budget, Guard
from .clock import Clock
from .contract import Technique
from .energy import EnergyMeter
from .flops import FlopCounter, Flops
from .meter import Windows, batch_size

# what each rank adds to the exchanged vector
SIGNAL, HORIZON, SAVE, SAMPLES, TOKENS, COUNTED, REALISED, JOULES = range(8)


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
        self.evaluation_seconds = 0.0  # the last whole evaluation
        self.energy_source = "estimated"
        self.data_wait = 0.0
        self._local = [0.0] * 8
        self._flops: dict[Any, Flops] = {}
        self._counter: FlopCounter | None = None
        self._signal = 0.0  # this rank has been asked to stop
        self.signalled = False  # some rank has, and all ranks know it
        self.save_due = False  # rank 0 wants a checkpoint, and all ranks know it
        self._first = True
        self._energy_due = 0.0
        self._batch_ended = perf_counter()

    # -- start -------------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer._shoestring_clock = self.clock  # type: ignore[attr-defined]
        self.agreement = Agreement(len(self._local))
        self.world = trainer.world_size
        self.energy = EnergyMeter(self.watts_per_device, 1)
        self._base = self.clock.spend
        self._parameters = list(pl_module.parameters())
        self._masked = [c for c in trainer.callbacks if isinstance(c, Technique) and hasattr(c, "densities")]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._base = type(self.clock.spend).from_dict(self.clock.spend.as_dict())
        self._set_limits(trainer)
        self.refresh()
        self.guard.skip(self.clock)
        self._batch_ended = self.windows.enter("train")

    def _set_limits(self, trainer: pl.Trainer) -> None:
        limits = self.budget.limits()
        batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        ends = [limits["steps"]] if "steps" in limits else []
        if batches not in (0, float("inf")):
            self.clock.steps_per_epoch = -(-int(batches) // accumulate)
            if trainer.max_epochs and trainer.max_epochs > 0:
                ends.append(trainer.max_epochs * self.clock.steps_per_epoch)
        if trainer.max_steps and trainer.max_steps > 0:
            ends.append(trainer.max_steps)
        if ends:
            limits["steps"] = min(ends)
        self.clock.limits = limits
        self.guard = Guard(limits, self.agreement.lag)
        if "steps" in limits and not self.clock.horizons:
            self.clock.replan(0, int(limits["steps"]))

    # -- the step ----------------------------------------------------------------------------------------------------
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.data_wait += perf_counter() - self._batch_ended
        samples, tokens, shape = batch_size(batch)
        local = self._local
        local[SAMPLES] += samples
        local[TOKENS] += tokens
        if self.count_flops:
            kind = (shape, [p.requires_grad for p in self._parameters].count(True), self._mask_version())
            flops = self._flops.get(kind)
            if flops is None:
                self._kind = kind
                self._counter = FlopCounter(self._densities(pl_module))
                self._counter.__enter__()
            else:
                local[COUNTED] += flops.counted
                local[REALISED] += flops.realised

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._close_counter()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.clock.step += 1
            self._account(trainer)
            self.on_step(trainer, pl_module, outputs)
        self._batch_ended = perf_counter()

    def _close_counter(self) -> None:
        assert self._counter is not None
        self._counter.__exit__(None, None, None)
        flops = self._flops[self._kind] = self._counter.flops
        self._local[COUNTED] += flops.counted
        self._local[REALISED] += flops.realised
        self._counter = None

    def _account(self, trainer: pl.Trainer) -> None:
        """Exchange counters and decisions, and stop where the plan ends."""
        clock, local = self.clock, self._local
        local[SIGNAL] = self._signal
        if self._first:
            self._begin(trainer)
        else:
            self._hear(self.agreement.exchange(local))
            self.refresh()
            if trainer.is_global_zero:
                self.guard.observe(clock)
                local[HORIZON] = self.guard.decide(clock) or 0
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
        self.refresh()
        vote = 0
        self.guard.behind = 0
        if trainer.is_global_zero:
            self.guard.observe(self.clock)
            vote = self.guard.decide(self.clock) or 0
        self.guard.behind = self.guard.lag
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
        if self.world > 1:
            self._follow(sums[HORIZON])
        self.signalled = self.signalled or sums[SIGNAL] > 0
        self.save_due = self.save_due or sums[SAVE] > 0

    def _follow(self, last: float) -> None:
        if last and last != self.clock.horizon:
            self.clock.replan(self.clock.step, int(last))
            self.on_replan(self.clock.step, int(last))

    def refresh(self) -> None:
        """Bring the spend that this process measures itself up to now."""
        spend, base = self.clock.spend, self._base
        elapsed = self.windows.total()
        spend.steps = self.clock.step
        spend.seconds = base.seconds + elapsed
        spend.device_seconds = base.device_seconds + elapsed * self.world
        spend.usd = base.usd + elapsed * self.world * self.usd_per_device_hour / 3600
        if elapsed >= self._energy_due:
            self._energy_due = elapsed + 1.0
            self._local[JOULES], self.energy_source = self.energy.read()

    # -- pauses ------------------------------------------------------------------------------------------------------
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_began = self.windows.enter("evaluation")
        self._validation_batches = 0

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._validation_batches += 1
        if self._signal or self.world > 1:
            self._local[SIGNAL], self._local[HORIZON], self._local[SAVE] = self._signal, 0, 0
            self._hear(self.agreement.exchange(self._local))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = self.windows.enter("startup" if trainer.sanity_checking else "train")
        whole = sum(n for n in trainer.num_val_batches if n != float("inf"))
        each = (now - self._validation_began) / max(1, self._validation_batches)
        self.evaluation_seconds = each * max(whole, self._validation_batches)
        if not trainer.sanity_checking:
            self.pause_ended()

    def pause_ended(self) -> None:
        """What happened since the last step was not the cost of a step."""
        self.refresh()
        self.guard.skip(self.clock)
        self._batch_ended = perf_counter()

    # -- end ---------------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.windows.enter("other")
        self._local[SIGNAL] = self._local[HORIZON] = self._local[SAVE] = self._energy_due = 0
        self.refresh()
        self.agreement.settle()
        self._hear(self.agreement.now(self._local))
        self.refresh()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    # -- for the trainer's extension ---------------------------------------------------------------------------------
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any) -> None:
        """An optimizer step has ended and is accounted for."""

    def on_replan(self, step: int, last: int) -> None:
        """The end of the run has moved."""

    # -- masks -------------------------------------------------------------------------------------------------------
    def _mask_version(self) -> Any:
        return tuple(t.mask_version for t in self._masked) if self._masked else None  # type: ignore[attr-defined]

    def _densities(self, pl_module: pl.LightningModule) -> dict[int, float]:
        kept = {name: d for t in self._masked for name, d in t.densities().items()}  # type: ignore[attr-defined]
        if not kept:
            return {}
        return {p.untyped_storage().data_ptr(): kept[n] for n, p in pl_module.named_parameters() if n in kept}

    def state_dict(self) -> dict[str, Any]:
        return {"clock": self.clock.state_dict(), "evaluation_seconds": self.evaluation_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.load_state_dict(state_dict["clock"])
        self.evaluation_seconds = state_dict["evaluation_seconds"]
