"""The trainer's observer: the accountant, plus the journal, checkpoints, signals, W&B and the closing summary.

One Lightning callback does all of it, because every callback costs a dozen calls a step whether it acts or not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from .. import ShoestringError
from ..callbacks.accountant import JOULES, SAVE, Accountant
from ..callbacks.budget import Budget
from ..callbacks.clock import MEASURED, Duration
from ..callbacks.meter import Windows, communication_bytes, peak_bytes
from ..callbacks.samples import take_over
from . import state
from .records import Records
from .saving import Saver, save_final_weights
from .signals import Preempted, StopRequest

log = logging.getLogger("shoestring")

NEVER = 2**60  # a validation interval, in batches


class CannotResume(ShoestringError):
    """This run directory cannot be continued as asked."""


class Observer(Accountant):
    """Keeps the run's records and its ability to go on. Made by `Trainer`."""

    def __init__(
        self,
        budget: Budget,
        *,
        seed: int,
        records: Records,
        resume: Literal["auto", "must", False],
        checkpoint_every: str | None,
        keep: int,
        strategy: str,
        usd_per_device_hour: float,
        watts_per_device: float | None,
        log_every: int = 10,
    ) -> None:
        super().__init__(budget, usd_per_device_hour=usd_per_device_hour, watts_per_device=watts_per_device)
        self.seed, self.records, self.resume = seed, records, resume
        self.every = Duration.parse(checkpoint_every) if checkpoint_every else None
        self.keep, self.strategy, self.log_every = keep, strategy, log_every
        self.peak_flops: float | None = None
        self.evaluations: Duration | None = None  # how often; None leaves it to Lightning
        self.final_evaluation = True
        self.goal: Any = None  # metric, and the number to be above or below
        self.summary: dict[str, Any] = {}
        self.request = StopRequest()
        self.resumed_from: int | None = None
        self._rng: Mapping[str, Any] | None = None
        self._loss: Any = None  # of this rank's micro-batches since the last step
        self._row_step = self._saved_step = -1
        self._metrics: dict[str, float] = {}
        self._finished = False

    def begin(self, startup_seconds: float = 0.0) -> None:
        """`fit` has been entered: the clock starts."""
        self.windows = Windows()
        self.windows.seconds["startup"] = startup_seconds

    def evaluate_every(self, every: str | None, *, at_end: bool = True) -> None:
        """Validate every `every` (None: only at the end), instead of when Lightning would."""
        self.evaluations = Duration.parse(every) if every else Duration(float("inf"), "steps")
        self.final_evaluation = at_end

    # -- start ------------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.order = take_over(trainer, self.seed)
        self.request.listen()
        self.records.open(trainer)
        self.saver = Saver(self.records.run_dir / "checkpoints", self.keep, self.agreement, self.records.event)
        found = self.saver.restore(trainer, pl_module) if self.resume else None
        if found is None:
            if self.resume == "must":
                raise CannotResume(f"{self.records.run_dir} has no checkpoint to resume from")
            return
        manifest, self._rng = found
        if self.order is not None and manifest["global_batch"] not in (None, self.order.global_batch):
            raise CannotResume(
                f"the run in {self.records.run_dir} has {manifest['global_batch']} samples a step, and this loader makes "
                f"{self.order.global_batch}. Choose batch size x ranks x accumulation to match."
            )
        self.resumed_from = manifest["step"]
        self.clock.spend = self.records.spent(self.clock.spend)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.clock.horizon is not None and self.clock.step >= self.clock.horizon:
            self.stopped_by, trainer.should_stop = self._binding(), True
        self.request.listen()
        # Lightning asks all ranks about signals with a blocking broadcast before every batch; ours ride along
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._trainable = sum(p.numel() for p in self._parameters if p.requires_grad)
        self.records.started(trainer, self.resumed_from, self.strategy, self._totals())
        self._row_tokens, self._row_time = self.clock.spend.tokens or self.clock.spend.samples, perf_counter()
        self._next_save = self._moment(self.every) if self.every else 0
        if self.evaluations is not None and self.evaluations.counts in MEASURED:
            self.evaluations = self.clock.as_progress(self.evaluations)  # ranks must agree on the step
        self._evaluated = self._moment(self.evaluations) if self.evaluations else 0
        if self._rng is not None:
            state.set_rng_state(self._rng)
        else:
            state.seed_rank(self.seed, trainer.global_rank, self.clock.step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.order is not None and self.order.weights:
            self.order.weigh(batch, pl_module.device)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    # -- the step ---------------------------------------------------------------------------------------------------
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.request.received:
            self._signal = 1.0
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:  # Lightning has divided it by the number of micro-batches: their sum is the step's mean
            self._loss = self._loss + loss if batch_idx % trainer.accumulate_grad_batches else loss
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any) -> None:
        step = self.clock.step
        due = step % self.log_every == 0 or perf_counter() - self._row_time > 0.25
        if self.records.keeps and (due or trainer.should_stop):
            self._row(trainer)
        if self.evaluations is not None:
            self._plan_evaluation(trainer)
        if self._save_is_due(trainer):
            self._save(trainer, pl_module)
        if self.signalled and not trainer.should_stop:
            raise self._preempted(trainer)

    def _plan_evaluation(self, trainer: pl.Trainer) -> None:
        """Tell Lightning to validate after this batch if a whole interval has passed, or not to."""
        assert self.evaluations is not None
        moment = self._moment(self.evaluations)
        loop = trainer.fit_loop.epoch_loop
        trainer.val_check_batch = loop.total_batch_idx + 1 if moment > self._evaluated else NEVER
        self._evaluated = moment
        if trainer.should_stop and not self.final_evaluation:
            trainer.limit_val_batches = 0

    def _save_is_due(self, trainer: pl.Trainer) -> bool:
        """At the first and the last step, when asked to stop, and every interval: measured ones as rank 0 says."""
        if self._saved_step < 0 or trainer.should_stop or self.signalled:
            return True
        if self.every is None:
            return False
        if self.every.counts not in MEASURED:
            return self._moment(self.every) > self._next_save
        self._local[SAVE] = float(trainer.is_global_zero and self._moment(self.every) > self._next_save)
        return self.save_due

    def _row(self, trainer: pl.Trainer) -> None:
        now, spend = perf_counter(), self.clock.spend
        done = spend.tokens or spend.samples
        rate = (done - self._row_tokens) / max(1e-9, now - self._row_time)
        row = {
            "step": self.clock.step,
            "loss": float(self._loss) if self._loss is not None else None,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "progress": self.clock.progress,
            "horizon": self.clock.horizon,
            "tokens_per_second" if spend.tokens else "samples_per_second": rate,
            "data_wait": self.data_wait / max(1e-9, self._train_seconds()),
            "peak_bytes": peak_bytes(trainer.strategy.root_device),
            **self._totals(),
        }
        self._row_tokens, self._row_time, self._row_step = done, now, self.clock.step
        self.records.step(self.clock.step, row)

    def _totals(self) -> dict[str, Any]:
        spend = self.clock.spend
        return {
            "samples": spend.samples,
            "tokens": spend.tokens,
            "seconds": spend.seconds,
            "device_seconds": spend.device_seconds,
            "usd": spend.usd,
            "kwh": spend.kwh,
            "kwh_source": self.energy_source,
            "flops_counted": spend.flops_counted,
            "flops_realised": spend.flops,
            "mfu": self._mfu(),
        }

    def _train_seconds(self) -> float:
        opened = perf_counter() - self.windows._since if self.windows._open == "train" else 0.0
        return self.windows.seconds.get("train", 0.0) + opened

    def _mfu(self) -> float | None:
        """Counted FLOPs of this attempt's steps over what the devices could have done meanwhile."""
        if not self.peak_flops:
            return None
        done = self.clock.spend.flops_counted - self._base.flops_counted
        return done / max(1e-9, self._train_seconds() * self.peak_flops * self.world)

    def on_replan(self, step: int, last: int) -> None:
        self.records.event("replan", step=step, last=last, progress=self.clock.progress)

    # -- saving -----------------------------------------------------------------------------------------------------
    def _moment(self, interval: Duration) -> float:
        """How many whole intervals have passed."""
        if interval.counts == "progress":
            return self.clock.progress // interval.amount
        if interval.counts == "epochs":
            return self.clock.step / (self.clock.steps_per_epoch or 1) // interval.amount
        return self.clock.spend.get(interval.counts) // interval.amount

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._saved_step == self.clock.step:
            return
        self.windows.enter("checkpoint")
        self._hear(self.agreement.settle())  # the sums of this very step belong to it
        self._saved_step, self.save_due, self._local[SAVE] = self.clock.step, False, 0.0
        self.records.sync()
        about = {"global_batch": self.order and self.order.global_batch, "accumulate": trainer.accumulate_grad_batches}
        self.saver.save(trainer, module, self.clock.step, about)
        self._next_save = self._moment(self.every) if self.every else 0
        self.windows.enter("train")
        self.pause_ended(trainer)

    def set_aside(self, trainer: pl.Trainer) -> None:
        super().set_aside(trainer)
        if not self.final_evaluation:
            self.guard.reserve_seconds = 0.0
        self.closing_seconds = self.saver.seconds
        self.guard.reserve_seconds += 2 * self.saver.seconds  # the final weights take no longer than a checkpoint
        if self.every is not None:
            self.guard.pauses["checkpoint"] = (self._steps_in(self.every), self.saver.seconds)

    def evaluation_interval(self, trainer: pl.Trainer) -> float:
        return self._steps_in(self.evaluations) if self.evaluations else super().evaluation_interval(trainer)

    def _steps_in(self, interval: Duration) -> float:
        """About how many steps an interval is, by what steps have cost so far."""
        if interval.counts == "progress":
            return max(1.0, interval.amount * (self.clock.horizon or float("inf")))
        if interval.counts == "epochs":
            return max(1.0, interval.amount * (self.clock.steps_per_epoch or float("inf")))
        spent = self.clock.spend.get(interval.counts)
        return max(1.0, interval.amount * self.clock.step / spent) if spent and self.clock.step else float("inf")

    def _preempted(self, trainer: pl.Trainer) -> BaseException:
        self.records.event(
            "preempted", step=self.clock.step, signal=self.request.received or "on another rank", **self._totals()
        )
        log.warning("asked to stop: step %d is saved; the same command goes on from here", self.clock.step)
        # Lightning's launcher kills rank 0 when a rank that it started returns anything but 0
        own = getattr(trainer.strategy.launcher, "procs", None) is not None and not _external(trainer)
        return Preempted(0) if own and trainer.local_rank > 0 else Preempted()

    # -- evaluation -------------------------------------------------------------------------------------------------
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._signal = float(bool(self.request.received))
        super().on_validation_batch_end(trainer, pl_module, *args)
        if self.signalled and not trainer.sanity_checking and not trainer.should_stop:
            raise StopIteration  # ends the evaluation; weights are put back before anything is saved

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        if self.signalled and not trainer.should_stop:
            self._save(trainer, pl_module)
            raise self._preempted(trainer)
        if self.evaluation_cut:
            seen = len(self._validation_times) - 1
            self.records.event("evaluation_cut", step=self.clock.step, batches=seen)
            log.warning("the budget ended the evaluation after %d batches; its metrics are of those", seen)
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if isinstance(v, torch.Tensor | float | int)}
        self._metrics.update(found)
        if goal_reached(self.goal, found) and not trainer.should_stop:
            self.stopped_by, trainer.should_stop = "goal", True
        self.records.step(self.clock.step, {"step": self.clock.step, **found})

    # -- end --------------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.saver.seconds or self.resumed_from is not None:
            if self._saved_step != self.clock.step and self.resumed_from != self.clock.step:
                self._save(trainer, pl_module)
                self.windows.enter("other")
            save_final_weights(trainer, pl_module, self.records.run_dir / "final.safetensors")
        self.refresh()
        peaks = self.agreement.gather((peak_bytes(trainer.strategy.root_device), self._local[JOULES]))
        self.summary = {
            "steps": self.clock.step,
            **self._totals(),
            "peak_bytes": max(p for p, _ in peaks),
            "tokens_per_second": (self.clock.spend.tokens - self._base.tokens) / max(1e-9, self._train_seconds()),
            "samples_per_second": (self.clock.spend.samples - self._base.samples) / max(1e-9, self._train_seconds()),
            "data_wait": self.data_wait / max(1e-9, self._train_seconds()),
            "comm_bytes": self._communication(trainer),
            "windows": dict(self.windows.seconds),
            "stopped_by": self.stopped_by or ("max_epochs" if not trainer.should_stop else "callback"),
            "budget": dict(self.budget.given()),
            "strategy": self.strategy,
            "world_size": trainer.world_size,
            "resumed_from": self.resumed_from,
            "metrics": {**self._metrics, **_floats(trainer.callback_metrics)},
            "run_dir": str(self.records.run_dir),
        }
        if self.goal is not None:
            self.summary["goal"] = {"metric": self.goal.metric, "above": self.goal.above, "below": self.goal.below}
            self.summary["goal_reached"] = goal_reached(self.goal, self.summary["metrics"])
        self._finish(trainer)
        self.records.finished(self.summary, self.windows.seconds)

    def _communication(self, trainer: pl.Trainer) -> float:
        size = 2 if "16" in str(trainer.precision) else 4
        each = communication_bytes(
            self.strategy, self._trainable, size, trainer.world_size, trainer.accumulate_grad_batches
        )
        return each * (self.clock.step - self._base.steps)

    def _binding(self) -> str:
        return min(self.clock.limits, key=lambda name: self.clock.limits[name] - self.clock.spend.get(name))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._finish(trainer)
        preempted = isinstance(exception, Preempted)
        reason = None if preempted else f"{type(exception).__name__}: {exception}"
        self.records.failed(self.clock.step, reason, self._spent_so_far())

    def _spent_so_far(self) -> dict[str, Any]:
        """Totals at a failure; nothing if it came before training began."""
        if not hasattr(self, "guard"):
            return {}
        self.refresh()
        return self._totals()

    def _finish(self, trainer: pl.Trainer) -> None:
        if not self._finished:
            self._finished = True
            self.request.release()


def goal_reached(goal: Any, metrics: Mapping[str, float]) -> bool | None:
    """Whether `goal` (metric, above, below) is met; None if there is none or its metric was never logged."""
    if goal is None or goal.metric not in metrics:
        return None
    value = metrics[goal.metric]
    return value > goal.above if goal.above is not None else value < goal.below


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, torch.Tensor | float | int)}


def _external(trainer: pl.Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return bool(environment is not None and environment.creates_processes_externally)
