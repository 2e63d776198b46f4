"""The trainer's monitor: one callback, the last one, that keeps a run's account and its ability to go on.

Its `on_train_batch_end` is the loop of a run; what it does there is done by collaborators that it owns:

    account       what is spent, what the ranks agree on, the horizon        callbacks/accounting/account.py
    records       journal, ledger, W&B, display                              records.py
    rows, totals  what is written there of a step and of the run             totals.py
    epochs        the order of samples, and what waits for an epoch's end    epochs.py
    evaluations   when to evaluate, and the goal                             evaluations.py
    further       what evaluations ask of the model besides validation         further.py
    best          which evaluation was the best, and when patience is over   best.py
    checkpoints   when to save                                               checkpoints.py
    nonfinite     steps without finite losses and gradients                  nonfinite.py
    stopping      signals, and how they end it                               stopping.py
    hang          a run that no longer moves                                 hang.py

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
from ...callbacks.parameters.buffers import agree_buffers
from ...callbacks.parameters.shards import lay_out_plainly
from ..checkpoint import random_states
from ..checkpoint.buckets import settle_buckets
from ..checkpoint.saver import no_room, same_samples
from ..ledger import read_summary
from ..ledger.verdict import problems
from ..machine.signals import Preempted
from .afterwards import Afterwards
from .best import Best
from .checkpoints import Checkpoints
from .cut_window import CutWindow
from .epochs import Epochs
from .evaluations import Evaluations
from .failures import blame, forget
from .further import FurtherEvaluations
from .hang import HangWatch
from .nonfinite import NonFiniteSteps
from .out_of_memory import note_memory
from .records import Records
from .stopping import Stopping
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
        best: str | None = None,
        patience: int | None = None,
        mtbf: float | None = None,
        strategy: str,
        usd_per_device_hour: float,
        watts_per_device: float | None,
        log_every: int = 10,
        hang_after: str = "auto",
        nonfinite_steps: int = 10,
        accept_changes: bool = False,
    ) -> None:
        self.account = Account(budget, usd_per_device_hour=usd_per_device_hour, watts_per_device=watts_per_device)
        self.account.moved, self.account.upcoming = self._moved, self._upcoming
        self.records = records
        self.epochs, self.evaluations = Epochs(), Evaluations()
        self.checkpoints = Checkpoints(self.account, checkpoint_every, keep, mtbf)
        self.best = Best(best, patience)
        self.totals = Totals(self.account)
        self.rows = StepRows(self.totals, log_every)
        self.stopping = Stopping(self.account, self.checkpoints, records, self.totals)
        self.further = FurtherEvaluations(self.account, self.stopping, records)
        self.hang = HangWatch(self.account, records, hang_after)
        self.nonfinite = NonFiniteSteps(nonfinite_steps, self.records.nonfinite)
        self.seed, self.resume, self.strategy, self.accept_changes = seed, resume, strategy, accept_changes
        self.summary: dict[str, Any] = {}
        self.each_step: Callable[[], None] | None = None  # called on every rank when a step has ended
        self.afterwards: Afterwards | None = None  # what the final weights are used for, as part of the run
        self.resumed_from: int | None = None
        self._cut_window: CutWindow | None = None
        self._rng: Mapping[str, Any] | None = None
        self._begun = False
        self.failed_first: int | None = None  # the rank whose failure has ended the fit

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
        mine = account.spending.mine
        mine.stop = self.stopping.wanted
        mine.nonfinite = float(self.nonfinite.step_ends(self.rows.loss, account.clock.step, batch_idx))
        account.agree()
        account.replan(trainer)
        if account.nonfinite_steps:
            self.nonfinite.check(account.nonfinite_steps)
        account.stop_at_horizon(trainer)
        if self.each_step is not None:
            self.each_step()
        if self.records.keeps and (self.rows.due() or trainer.should_stop or account.stopped_by):
            self.records.step(account.clock.step, self.rows.row(trainer))
        if self.evaluations.every is not None:
            self.evaluations.plan(trainer, account.clock)
        if self.checkpoints.under_way:
            self.checkpoints.advance(trainer)
        if self.checkpoints.due(trainer):
            ends = trainer.should_stop or account.stopped_by is not None
            self.epochs.save_waits = not ends and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
            if not self.epochs.save_waits:
                self.checkpoints.save(trainer, pl_module)
        if account.stop_requested and not trainer.should_stop and not self.epochs.save_waits:
            raise self.stopping.end(trainer, self.resumed_from)
        account.spending.wait_for_data()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        order, lengths = self.epochs.order, None
        if order is not None and order.targets is not None:
            order.weigh(batch, batch_idx, pl_module.device)
        if order is not None and order.lengths is not None:
            lengths = order.row_lengths(batch_idx)
        self.account.batch_begins(trainer, batch, batch_idx, lengths)
        if self.account.cut_window:
            self._cut_window = CutWindow(trainer, pl_module, self.account.cut_window)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.begin(trainer, self.account.horizon)
        if not self.epochs.save_waits:
            return
        with self.epochs.between(trainer):
            self.checkpoints.save(trainer, pl_module)
        if self.account.stop_requested and not trainer.should_stop:
            raise self.stopping.end(trainer, self.resumed_from)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.end(trainer)

    # -- start ------------------------------------------------------------------------------------------------------
    def begin(self, startup_seconds: float = 0.0) -> None:
        """`fit` has been entered: the clock starts."""
        self.account.begin(startup_seconds)
        self._begun, self.resumed_from, self._rng = False, None, None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        lay_out_plainly(pl_module)  # before DDP or an engine takes the layout for its own

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        account = self.account
        account.open(trainer, pl_module)
        self.epochs.open(trainer, self.seed)
        trainer.fit_loop.epoch_loop.val_loop.after_repeated = lambda: self._evaluated(trainer)  # type: ignore[attr-defined]
        self.stopping.request.listen()  # all ranks are connected by now
        forget()
        self.records.open(trainer)
        self.checkpoints.open(trainer, self.records, self._about)
        settle_buckets(trainer.strategy.model, trainer.world_size)
        # of a recipe's run the records have compared more than could be seen here
        accept = self.accept_changes or self.records.recipe is not None
        if (restored := self.checkpoints.restore(trainer, pl_module, self.resume, accept)) is not None:
            manifest, self._rng = restored
            same_samples(manifest, self.seed, self.epochs.global_batch, self.records.run_dir)
            self.resumed_from = manifest["step"]
            account.clock.spend = self.records.spent(account.clock.spend)
        self.epochs.restored(trainer, account.horizon)
        self.nonfinite.open(trainer)
        account.spending.start()
        self._begun = True
        self.stopping.before_training(trainer, self.resumed_from)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stopping.before_training(trainer, self.resumed_from)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        account, clock = self.account, self.account.clock
        self.stopping.before_training(trainer, self.resumed_from)
        self.epochs.start(trainer)
        account.start(trainer)
        if clock.horizon is not None and clock.step >= clock.horizon:
            end = clock.first_limit()
            account.stopped_by, trainer.should_stop = account.horizon.name(end.binding if end else "steps"), True
        # Lightning asks all ranks about signals with a blocking broadcast before every batch; ours ride along
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.totals.trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.records.started(trainer, self.resumed_from, self.strategy, self.totals.so_far())
        self.rows.start()
        self.checkpoints.start()
        self.evaluations.start(clock)
        if self._rng is not None:
            random_states.set_rng_state(self._rng)
        else:
            random_states.seed_rank(self.seed, trainer.global_rank, clock.step)
        self.hang.start(trainer.global_rank, trainer.world_size)

    # -- what comes besides steps -----------------------------------------------------------------------------------
    def _moved(self, step: int, last: int) -> None:
        self.records.event("replan", step=step, last=last, progress=self.account.clock.progress)

    def _upcoming(self, trainer: pl.Trainer) -> Upcoming:
        every = self.evaluations.steps_between(self.account.clock)
        upcoming = self.account.evaluations_to_come(trainer, every)
        self.further.add_to(upcoming)
        if not self.evaluations.at_end:
            upcoming.after_seconds = 0.0
        self.checkpoints.add_to(upcoming)
        self.best.add_to(upcoming, self.checkpoints.saver.seconds)
        return self.afterwards.add_to(upcoming, self.account) if self.afterwards is not None else upcoming

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        settle_buckets(trainer.strategy.model, trainer.world_size)
        self.account.reshaped(trainer)
        self.totals.trainable = sum(where.numel for where in shards_of(trainer, pl_module).slices.values())
        self.records.event("reshape", step=self.account.clock.step, trainable=self.totals.trainable)
        self.best.reshaped(trainer, self.records)

    def _about(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Of the run, for the manifest of a checkpoint."""
        return {
            "seed": self.seed, "global_batch": self.epochs.global_batch, "run": self.records.identity.as_dict(),
            "accumulate": trainer.accumulate_grad_batches,
        }  # fmt: skip

    # -- evaluation; `trainer.validate` is no part of the run -------------------------------------------------------
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            agree_buffers(pl_module)
            self.account.evaluation_begins()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.state.fn == "fit":
            self._evaluated(trainer)

    def _evaluated(self, trainer: pl.Trainer) -> None:
        """One batch, on every rank."""
        self.account.spending.mine.stop = self.stopping.wanted
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
            measured = {**trainer.callback_metrics, **dict.fromkeys(self.further.metrics())}
            self.evaluations.check_goal(measured)
            self.best.check(measured)
            self.further.trial(trainer, pl_module)
            return
        if account.stop_requested and not trainer.should_stop:
            self.checkpoints.save(trainer, pl_module)
            raise self.stopping.end(trainer, self.resumed_from)
        if account.evaluation_cut:
            self.records.evaluation_cut(account.clock.step, account.evaluation.batches)
        whole = not account.evaluation_cut and self.further.run(trainer, pl_module)
        metrics = numbers(trainer.callback_metrics)
        if self.evaluations.update(metrics) and not trainer.should_stop:
            account.stopped_by, trainer.should_stop = "goal", True
        self.records.step(account.clock.step, {"step": account.clock.step, **metrics})
        if whole:
            self.best.evaluated(trainer, pl_module, account, self.checkpoints.saver, self.records)

    # -- end --------------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (account := self.account).close(trainer)
        lost = self.checkpoints.keep_weights(trainer, pl_module, self.resumed_from)
        if self.afterwards is not None and not lost:
            self.afterwards.act(account, trainer.is_global_zero)
        account.spending.refresh()
        gathered = account.agreement.gather((peak_bytes(trainer.strategy.root_device), account.stopped_by))
        account.stopped_by = gathered[0][1]
        self.hang.stop()
        self.summary = self._summary(trainer, max(peak for peak, _ in gathered))
        if lost:
            raise no_room(account.clock.step, lost, self.records.run_dir)
        self.records.finished(self.summary, account.spending.windows.so_far())
        self.stopping.request.release()

    def _summary(self, trainer: pl.Trainer, peak: int) -> dict[str, Any]:
        metrics = {**self.evaluations.metrics, **numbers(trainer.callback_metrics)}
        summary = {
            **self.totals.summary(trainer, self.strategy, peak), "resumed_from": self.resumed_from,
            "metrics": metrics, "run_dir": str(self.records.run_dir),
        }  # fmt: skip
        summary |= self.evaluations.goal_facts(metrics) | self.best.facts()
        summary["problems"] = problems(summary)
        done = self.resumed_from == self.account.clock.step  # nothing was left to do
        return of_finished(summary, read_summary(self.records.run_dir)) if done else summary

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.hang.stop()
        note_memory(exception, trainer, pl_module, self.records.run_dir)
        self.account.abort(trainer)
        reason = None
        if not isinstance(exception, Preempted):
            self.failed_first, reason = blame(exception, trainer.global_rank)
        self.records.failed(self.account.clock.step, reason, self._spent_so_far())
        self.checkpoints.abandon()
        self.stopping.request.release()

    def _spent_so_far(self) -> dict[str, Any]:
        """Totals at a failure; nothing if it came before training began."""
        if not self._begun:
            return {}
        self.account.spending.refresh()
        return self.totals.so_far()

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {**self.account.state_dict(), "epochs": self.epochs.state_dict(), "best": self.best.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.account.load_state_dict(state_dict)
        self.epochs.load_state_dict(state_dict["epochs"])
        self.best.load_state_dict(state_dict.get("best", {}))
