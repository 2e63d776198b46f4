"""The trainer's observer: the accountant, plus the journal, checkpoints, signals, W&B and the closing summary.

One Lightning callback does all of it, because every callback costs a dozen calls a step whether it acts or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.trainer.connectors.data_connector import _parse_num_batches
from pytorch_lightning.trainer.states import RunningStage

from ...callbacks.accounting.accountant import SAVE, Accountant
from ...callbacks.accounting.budget import Budget
from ...callbacks.accounting.clock import MEASURED, Duration
from ...callbacks.accounting.meter import Windows, peak_bytes
from ...callbacks.parameters.accessor import shards_of
from ...callbacks.sampling.samples import take_over
from ..checkpoint import format as checkpoint
from ..checkpoint import state
from ..checkpoint.saver import CannotResume, CannotSave, Saver, same_samples, save_final_weights
from ..ledger import read_summary
from . import accounts
from .intervals import interval, passed, steps_in
from .records import Records
from .signals import Preempted, StopRequest, preempted

log = logging.getLogger("shoestring")

NEVER = 2**60  # a validation interval, in batches


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
        self.every = interval(checkpoint_every) if checkpoint_every else None
        self.keep, self.strategy, self.log_every = keep, strategy, log_every
        self.peak_flops: float | None = None
        self.evaluations: Duration | None = None  # how often; None leaves it to Lightning
        self.final_evaluation = True
        self.goal: Any = None  # metric, and the number to be above or below
        self.summary: dict[str, Any] = {}
        self.request = StopRequest()
        self.each_step: Callable[[], None] | None = None  # called on every rank when a step has ended
        self.resumed_from: int | None = None
        self._rng: Mapping[str, Any] | None = None
        self._loss: Any = None  # of this rank's micro-batches since the last step
        self._saved_step = -1
        self.metrics: dict[str, float] = {}
        self._finished = False

    def begin(self, startup_seconds: float = 0.0) -> None:
        """`fit` has been entered: the clock starts."""
        self.windows = Windows()
        self.windows.seconds["startup"] = startup_seconds

    def evaluate_every(self, every: str | None, *, at_end: bool = True) -> None:
        """Validate every `every` (None: only at the end), instead of when Lightning would."""
        self.evaluations = interval(every) if every else Duration(float("inf"), "steps")
        self.final_evaluation = at_end

    # -- start ------------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.order = take_over(trainer, self.seed)
        self._reshaping: list[Any] = [c for c in trainer.callbacks if hasattr(c, "reshapes_next")]
        self.request.listen()
        self.records.open(trainer)
        self.saver = Saver(self.records.run_dir / "checkpoints", self.keep, self.agreement, self.records.event)
        if not self.resume and self.agreement.gather(checkpoint.steps(self.saver.root))[0]:
            raise CannotResume(f"{self.records.run_dir} holds a run: resume it, or choose another run directory")
        self._resume(trainer, pl_module)
        if self.order is not None:  # loader workers draw batches before training starts, and these ask the clock
            whole = _parse_num_batches(RunningStage.TRAINING, len(self.order), trainer.limit_train_batches)
            self.set_limits(trainer, whole)

    def _resume(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = self.saver.restore(trainer, pl_module)
        if found is None:
            if self.resume == "must":
                raise CannotResume(f"{self.records.run_dir} has no checkpoint to resume from")
            return
        manifest, self._rng = found
        same_samples(manifest, self.seed, self._global_batch(), self.records.run_dir)
        self.resumed_from = manifest["step"]
        self.clock.spend = self.records.spent(self.clock.spend)

    def _global_batch(self) -> int | None:
        return None if self.order is None else self.order.global_batch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.clock.horizon is not None and self.clock.step >= self.clock.horizon:
            self.stopped_by, trainer.should_stop = accounts.nearest_limit(self.clock), True
        self.request.listen()
        # Lightning asks all ranks about signals with a blocking broadcast before every batch; ours ride along
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.records.started(trainer, self.resumed_from, self.strategy, accounts.totals(self))
        self._row_tokens, self._row_time = self.clock.spend.tokens or self.clock.spend.samples, perf_counter()
        self._next_save = passed(self.clock, self.every) if self.every else 0
        if self.evaluations is not None and self.evaluations.counts in MEASURED:
            self.evaluations = self.clock.as_progress(self.evaluations)  # ranks must agree on the step
        self._evaluated = passed(self.clock, self.evaluations) if self.evaluations else 0
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
        if self.each_step is not None:
            self.each_step()
        due = self.clock.step % self.log_every == 0 or perf_counter() - self._row_time > 0.25
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
        moment = passed(self.clock, self.evaluations)
        loop = trainer.fit_loop.epoch_loop
        trainer.val_check_batch = loop.total_batch_idx + 1 if moment > self._evaluated else NEVER
        self._evaluated = moment
        if trainer.should_stop and not self.final_evaluation:
            trainer.limit_val_batches = 0

    def _save_is_due(self, trainer: pl.Trainer) -> bool:
        """At the first and last step, before reshaping, when asked to stop, every interval (measured: rank 0 says)."""
        last = any(technique.reshapes_next(trainer) for technique in self._reshaping)  # in these shapes
        if self._saved_step < 0 or trainer.should_stop or self.signalled or last:
            return True
        if self.every is None:
            return False
        if self.every.counts not in MEASURED:
            return passed(self.clock, self.every) > self._next_save
        self._local[SAVE] = float(trainer.is_global_zero and passed(self.clock, self.every) > self._next_save)
        return self.save_due

    def _row(self, trainer: pl.Trainer) -> None:
        now, done = perf_counter(), self.clock.spend.tokens or self.clock.spend.samples
        rate = (done - self._row_tokens) / max(1e-9, now - self._row_time)
        self._row_tokens, self._row_time = done, now
        self.records.step(self.clock.step, accounts.row(self, trainer, self._loss, rate))

    def on_replan(self, step: int, last: int) -> None:
        self.records.event("replan", step=step, last=last, progress=self.clock.progress)

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_reshape(trainer, pl_module)
        self.trainable = sum(where.numel for where in shards_of(trainer, pl_module).slices.values())
        self.records.event("reshape", step=self.clock.step, trainable=self.trainable)

    # -- saving -----------------------------------------------------------------------------------------------------
    def _save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._saved_step == self.clock.step:
            return
        self.windows.enter("checkpoint")
        self._hear(self.agreement.settle())  # the sums of this very step belong to it
        self._saved_step, self.save_due, self._local[SAVE] = self.clock.step, False, 0.0
        self.records.sync()
        accumulate = trainer.accumulate_grad_batches
        about = {"seed": self.seed, "global_batch": self._global_batch(), "accumulate": accumulate}
        self.saver.save(trainer, module, self.clock.step, about)
        self._next_save = passed(self.clock, self.every) if self.every else 0
        self.windows.enter("train")
        self.pause_ended(trainer)

    def set_aside(self, trainer: pl.Trainer) -> None:
        super().set_aside(trainer)
        if not self.final_evaluation:
            self.guard.reserve_seconds = 0.0
        # the final weights take no longer than a checkpoint; the same again for a machine that is slow just then
        self.closing_seconds = 2 * self.saver.seconds
        self.guard.reserve_seconds += self.saver.seconds + self.closing_seconds
        if self.every is not None:
            self.guard.pauses["checkpoint"] = (steps_in(self.clock, self.every), self.saver.seconds)

    def evaluation_interval(self, trainer: pl.Trainer) -> float:
        return steps_in(self.clock, self.evaluations) if self.evaluations else super().evaluation_interval(trainer)

    def _preempted(self, trainer: pl.Trainer) -> BaseException:
        signal = self.request.received or "on another rank"
        self.records.event("preempted", step=self.clock.step, signal=signal, **accounts.totals(self))
        log.warning("asked to stop: step %d is saved; the same command goes on from here", self.clock.step)
        return preempted()

    # -- evaluation -------------------------------------------------------------------------------------------------
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._signal = float(bool(self.request.received))
        super().on_validation_batch_end(trainer, pl_module, *args)
        if trainer.state.fn == "fit" and self.signalled and not trainer.sanity_checking and not trainer.should_stop:
            raise StopIteration  # ends the evaluation; weights are put back before anything is saved

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.signalled and not trainer.should_stop:
            self._save(trainer, pl_module)
            raise self._preempted(trainer)
        if self.evaluation_cut:
            seen = self.evaluation.batches
            self.records.event("evaluation_cut", step=self.clock.step, batches=seen)
            say = log.warning if trainer.is_global_zero else log.debug
            say("the budget ended the evaluation after %d batches; its metrics are of those", seen)
        found = accounts.numbers(trainer.callback_metrics)
        self.metrics.update(found)
        if accounts.goal_reached(self.goal, found) and not trainer.should_stop:
            self.stopped_by, trainer.should_stop = "goal", True
        self.records.step(self.clock.step, {"step": self.clock.step, **found})

    # -- end --------------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        lost = self._keep_weights(trainer, pl_module)
        self.refresh()
        told = self.agreement.gather((peak_bytes(trainer.strategy.root_device), self.stopped_by))
        self.stopped_by = told[0][1]
        self.summary = accounts.summary(self, trainer, max(peak for peak, _ in told))
        if self.resumed_from == self.clock.step:  # nothing was left to do
            self.summary = accounts.as_it_was(self.summary, read_summary(self.records.run_dir))
        self._finish(trainer)
        if lost:
            raise CannotSave(
                f"the run has ended at step {self.clock.step}, but its final weights cannot be written: {lost}. "
                f"Make room in {self.records.run_dir} and give the same command: it goes on from the last checkpoint."
            )
        self.records.finished(self.summary, self.windows.seconds)

    def _keep_weights(self, trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
        """A checkpoint of the last step, and the whole weights in one file; what the disk said against the latter."""
        final = self.records.run_dir / "final.safetensors"
        done = self.resumed_from == self.clock.step and self.agreement.gather(final.exists())[0]
        if done or not self.clock.step:
            return None
        if self._saved_step != self.clock.step and self.resumed_from != self.clock.step:
            self._save(trainer, module)
            self.windows.enter("other")
        return self.agreement.gather(save_final_weights(trainer, module, final))[0]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._finish(trainer)
        reason = None if isinstance(exception, Preempted) else f"{type(exception).__name__}: {exception}"
        self.records.failed(self.clock.step, reason, self._spent_so_far())

    def _spent_so_far(self) -> dict[str, Any]:
        """Totals at a failure; nothing if it came before training began."""
        if not hasattr(self, "guard"):
            return {}
        self.refresh()
        return accounts.totals(self)

    def _finish(self, trainer: pl.Trainer) -> None:
        if not self._finished:
            self._finished = True
            self.request.release()
