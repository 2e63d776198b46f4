"""The trainer's monitor: one callback, the last one, that keeps a run's account and its ability to go on.

Its `on_train_batch_end` is the loop of a run; what it does there is done by collaborators that it owns:

    account       what is spent, what the ranks agree on, the horizon        callbacks/accounting/account.py
    records       journal, ledger, W&B, display                              records.py
    rows, totals  what is written there of a step and of the run             totals.py
    epochs        the order of samples, and what waits for an epoch's end    epochs.py
    evaluations   when to evaluate, and the goal                             evaluations.py
    checkpoints   when to save                                               checkpoints.py
    request       signals                                                    signals.py

It is one callback because every callback costs a dozen calls a step whether it acts or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytorch_lightning as pl

from ...callbacks.accounting.account import Account, Upcoming
from ...callbacks.accounting.budget import Budget
from ...callbacks.accounting.meter import peak_bytes
from ...callbacks.contract import ReshapeListener, silence
from ...callbacks.parameters.accessor import shards_of
from ..checkpoint import format as checkpoint
from ..checkpoint import state
from ..checkpoint.saver import CannotResume, CannotSave, same_samples, save_final_weights
from ..ledger import read_summary
from ..lightning.cut_window import CutWindow
from .checkpoints import Checkpoints
from .epochs import Epochs
from .evaluations import Evaluations, goal_reached
from .records import Records
from .signals import Preempted, StopRequest, preempted
from .totals import StepRows, Totals, numbers, of_finished

log = logging.getLogger("shoestring")


@silence
class Monitor(ReshapeListener, pl.Callback):
    """Keeps the run's account, its records and its ability to go on. Made by `Trainer`, whose arguments these are."""

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
        accept_changes: bool = False,
    ) -> None:
        self.account = Account(budget, usd_per_device_hour=usd_per_device_hour, watts_per_device=watts_per_device)
        self.account.moved, self.account.upcoming = self._moved, self._upcoming
        self.records, self.request = records, StopRequest()
        self.epochs, self.evaluations = Epochs(), Evaluations()
        self.checkpoints = Checkpoints(checkpoint_every, keep)
        self.totals = Totals(self.account)
        self.rows = StepRows(self.totals, log_every)
        self.seed, self.resume, self.strategy, self.accept_changes = seed, resume, strategy, accept_changes
        self.summary: dict[str, Any] = {}
        self.each_step: Callable[[], None] | None = None  # called on every rank when a step has ended
        self.resumed_from: int | None = None
        self._cut_window: CutWindow | None = None
        self._rng: Mapping[str, Any] | None = None
        self._begun = False

    # -- the loop ---------------------------------------------------------------------------------------------------
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        account = self.account
        self.rows.add_loss(outputs, first=batch_idx % trainer.accumulate_grad_batches == 0)
        if self._cut_window is not None:
            self.rows.scale_loss(self._cut_window.scale)
            self._cut_window.end()
            self._cut_window = None
        if not account.batch_ends(trainer):
            return  # amid an accumulation window
        account.spending.mine.stop = float(self.request.received is not None)
        account.agree()
        account.replan(trainer)
        account.stop_at_horizon(trainer)
        if self.each_step is not None:
            self.each_step()
        if self.records.keeps and (self.rows.due() or trainer.should_stop or account.stopped_by):
            self.records.step(account.clock.step, self.rows.row(trainer))
        if self.evaluations.every is not None:
            self.evaluations.plan(trainer, account.clock)
        if self.checkpoints.due(trainer, account):
            ends = trainer.should_stop or account.stopped_by is not None
            self.epochs.save_waits = not ends and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
            if not self.epochs.save_waits:
                self._save(trainer, pl_module)
                if account.stop_requested and not trainer.should_stop:
                    raise self._preempted()
        account.spending.wait_for_data()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        order = self.epochs.order
        if order is not None and order.targets is not None:
            order.weigh(batch, batch_idx, pl_module.device)
        self.account.batch_begins(trainer, batch, batch_idx)
        if self.account.cut_window:
            self._cut_window = CutWindow(trainer, pl_module, self.account.cut_window)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.begin(trainer, self.account.horizon)
        if not self.epochs.save_waits:
            return
        with self.epochs.between(trainer):
            self._save(trainer, pl_module)
        if self.account.stop_requested and not trainer.should_stop:
            raise self._preempted()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.end(trainer)

    # -- start ------------------------------------------------------------------------------------------------------
    def begin(self, startup_seconds: float = 0.0) -> None:
        """`fit` has been entered: the clock starts."""
        self.account.begin(startup_seconds)
        self._begun, self.resumed_from, self._rng = False, None, None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        account = self.account
        account.open(trainer, pl_module)
        self.epochs.open(trainer, self.seed)
        self.request.listen()
        self.records.open(trainer)
        self.checkpoints.open(trainer, account, self.records.run_dir / "checkpoints", self.records.event)
        root = self.checkpoints.saver.root
        if not self.resume and account.agreement.gather(checkpoint.steps(root))[0]:
            raise CannotResume(f"{self.records.run_dir} holds a run: resume it, or choose another run directory")
        self._resume(trainer, pl_module)
        self.epochs.restored(trainer, account.horizon)
        account.spending.start()
        self._begun = True

    def _resume(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # of a recipe's run the records have compared more than could be seen here
        accept = self.accept_changes or self.records.recipe is not None
        restored = self.checkpoints.saver.restore(trainer, pl_module, accept)
        if restored is None:
            if self.resume == "must":
                raise CannotResume(f"{self.records.run_dir} has no checkpoint to resume from")
            return
        manifest, self._rng = restored
        same_samples(manifest, self.seed, self.epochs.global_batch, self.records.run_dir)
        self.resumed_from = manifest["step"]
        self.account.clock.spend = self.records.spent(self.account.clock.spend)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        account, clock = self.account, self.account.clock
        self.epochs.start(trainer)
        account.start(trainer)
        if clock.horizon is not None and clock.step >= clock.horizon:
            end = clock.first_limit()
            account.stopped_by, trainer.should_stop = account.horizon.name(end.binding if end else "steps"), True
        self.request.listen()
        # Lightning asks all ranks about signals with a blocking broadcast before every batch; ours ride along
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.totals.trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.records.started(trainer, self.resumed_from, self.strategy, self.totals.so_far())
        self.rows.start()
        self.checkpoints.start(clock)
        self.evaluations.start(clock)
        if self._rng is not None:
            state.set_rng_state(self._rng)
        else:
            state.seed_rank(self.seed, trainer.global_rank, clock.step)

    # -- what comes besides steps -----------------------------------------------------------------------------------
    def _moved(self, step: int, last: int) -> None:
        self.records.event("replan", step=step, last=last, progress=self.account.clock.progress)

    def _upcoming(self, trainer: pl.Trainer) -> Upcoming:
        every = self.evaluations.steps_between(self.account.clock)
        upcoming = self.account.evaluations_to_come(trainer, every)
        if not self.evaluations.at_end:
            upcoming.after_seconds = 0.0
        return self.checkpoints.add_to(upcoming, self.account)

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.account.reshaped(trainer)
        self.totals.trainable = sum(where.numel for where in shards_of(trainer, pl_module).slices.values())
        self.records.event("reshape", step=self.account.clock.step, trainable=self.totals.trainable)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        windows, step = self.account.spending.windows, self.account.clock.step
        if self.checkpoints.saved_step == step:
            return
        windows.enter("checkpoint")
        self.records.sync()
        accumulate = trainer.accumulate_grad_batches
        about = {"seed": self.seed, "global_batch": self.epochs.global_batch, "accumulate": accumulate}
        self.checkpoints.save(trainer, module, self.account, about)
        windows.enter("train")
        self.account.pause_ends(trainer)

    def _preempted(self) -> BaseException:
        signal, step = self.request.received or "on another rank", self.account.clock.step
        self.records.event("preempted", step=step, signal=signal, **self.totals.so_far())
        log.warning("stopped on request: step %d is saved; the same command continues from here", step)
        return preempted()

    # -- evaluation; `trainer.validate` is no part of the run -------------------------------------------------------
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.account.evaluation_begins()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self.account.spending.mine.stop = float(self.request.received is not None)
        self.account.evaluation_batch_ends(trainer)
        stop = self.account.stop_requested and not trainer.sanity_checking and not trainer.should_stop
        if self.account.evaluation_cut or stop:
            raise StopIteration  # ends the evaluation; weights are put back before anything is saved

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        account = self.account
        account.evaluation_ends(trainer)
        if trainer.sanity_checking:
            return
        if account.stop_requested and not trainer.should_stop:
            self._save(trainer, pl_module)
            raise self._preempted()
        if account.evaluation_cut:
            self._report_cut(trainer)
        metrics = numbers(trainer.callback_metrics)
        if self.evaluations.update(metrics) and not trainer.should_stop:
            account.stopped_by, trainer.should_stop = "goal", True
        self.records.step(account.clock.step, {"step": account.clock.step, **metrics})

    def _report_cut(self, trainer: pl.Trainer) -> None:
        seen = self.account.evaluation.batches
        self.records.event("evaluation_cut", step=self.account.clock.step, batches=seen)
        say = log.warning if trainer.is_global_zero else log.debug
        say("the budget ended the evaluation early: its metrics cover %d batches only", seen)

    # -- end --------------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        account = self.account
        account.close(trainer)
        lost = self._keep_weights(trainer, pl_module)
        account.spending.refresh()
        gathered = account.agreement.gather((peak_bytes(trainer.strategy.root_device), account.stopped_by))
        account.stopped_by = gathered[0][1]
        self.summary = self._summary(trainer, max(peak for peak, _ in gathered))
        self.request.release()
        if lost:
            raise CannotSave(
                f"the run has ended at step {account.clock.step}, but its final weights cannot be written: {lost}. "
                f"Make room in {self.records.run_dir} and give the same command: it continues from the last checkpoint."
            )
        self.records.finished(self.summary, account.spending.windows.seconds)

    def _summary(self, trainer: pl.Trainer, peak: int) -> dict[str, Any]:
        metrics = {**self.evaluations.metrics, **numbers(trainer.callback_metrics)}
        summary = {
            **self.totals.summary(trainer, self.strategy, peak), "resumed_from": self.resumed_from,
            "metrics": metrics, "run_dir": str(self.records.run_dir),
        }  # fmt: skip
        if (goal := self.evaluations.goal) is not None:
            summary["goal"] = {"metric": goal.metric, "above": goal.above, "below": goal.below}
            summary["goal_reached"] = goal_reached(goal, metrics)
        if self.resumed_from == self.account.clock.step:  # nothing was left to do
            summary = of_finished(summary, read_summary(self.records.run_dir))
        return summary

    def _keep_weights(self, trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
        """A checkpoint of the last step, and the whole weights in one file; what the disk said against the latter."""
        account, step = self.account, self.account.clock.step
        final = self.records.run_dir / "final.safetensors"
        done = self.resumed_from == step and account.agreement.gather(final.exists())[0]
        if done or not step:
            return None
        if self.checkpoints.saved_step != step and self.resumed_from != step:
            self._save(trainer, module)
            account.spending.windows.enter("other")
        return account.agreement.gather(save_final_weights(trainer, module, final))[0]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.account.abort(trainer)
        self.request.release()
        reason = None if isinstance(exception, Preempted) else f"{type(exception).__name__}: {exception}"
        self.records.failed(self.account.clock.step, reason, self._spent_so_far())

    def _spent_so_far(self) -> dict[str, Any]:
        """Totals at a failure; nothing if it came before training began."""
        if not self._begun:
            return {}
        self.account.spending.refresh()
        return self.totals.so_far()

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {**self.account.state_dict(), "epochs": self.epochs.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.account.load_state_dict(state_dict)
        self.epochs.load_state_dict(state_dict["epochs"])
