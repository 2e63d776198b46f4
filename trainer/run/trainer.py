"""`Trainer`: a `pl.Trainer` that composes techniques, keeps a budget, records what it cost, and resumes exactly.

The loop, with the hooks in it (`A` micro-batches make one optimizer step):

    fit(module, data)
      setup                         techniques prepare the module
      strategy.setup                DDP wraps it, or DeepSpeed makes its engine
      on_fit_start                  the monitor takes over the sample order and restores the newest intact checkpoint
      on_train_start                base rates are read, random states are set
      for step in clock:            until the horizon, which the guard re-plans from measured cost
        for micro in range(A):
          on_train_batch_start      rates for this step; the batch is cut; the meter notes its shape
          training_step, backward
          on_before_optimizer_step  masks, at the accumulation boundary only
          optimizer step
          on_train_batch_end        averages; then the monitor: spend, decisions, journal, checkpoint, signals
      validation                    with averaged weights, at `evaluation.every` and once at the end
      on_train_end                  averages become the model; rates at their floor; final weights, summary
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Unpack

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, ModelSummary, ProgressBar
from pytorch_lightning.loops.fit_loop import _FitLoop
from pytorch_lightning.strategies import Strategy

from ...callbacks.accounting.budget import Budget
from ...callbacks.catalog.compose import compose
from ...callbacks.contract import Technique
from ...callbacks.optimization.lr_schedule import LRSchedule
from ...callbacks.sampling.samples import evaluate_evenly
from ...cluster.config.hardware import hardware
from ...strategies import Sharding
from ..checkpoint import format as checkpoint
from ..checkpoint.saver import CannotResume
from ..checkpoint.state import check
from ..machine import local_ranks
from ..machine.facts import facts as machine_facts
from ..machine.facts import peak, run_facts
from ..machine.signals import preempted, will_launch
from ..monitor.failures import RankLost, is_lost_rank
from ..monitor.monitor import Monitor
from ..monitor.records import Records
from ..monitor.stragglers import Stragglers
from .arguments import accelerator, dtype, fold, started_by_hand, strategy_name
from .options import LightningOptions
from .step_in_backward import in_backward
from .zero import make_strategy

log = logging.getLogger("shoestring")
# what a run of ours has of its own, and Lightning's where it is asked for
_SHOWN_OR_KEPT = {
    "enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar, "enable_model_summary": ModelSummary,
}  # fmt: skip


class Trainer(pl.Trainer):
    """A `pl.Trainer` that composes techniques, keeps a budget, records what it cost, and resumes exactly.

    Everything `pl.Trainer` takes still works; these come first. After `fit`, `summary` holds steps, tokens, samples,
    seconds, device_seconds, usd, kwh (+ kwh_source), flops_counted, flops_realised, peak_bytes, tokens_per_second, mfu,
    stopped_by and final metrics; of tasks with a loss over tokens also trained_tokens, and with a price
    usd_per_million_trained_tokens.

    Args:
        budget: Ends the run, annealed, when the first limit is reached.
        techniques: Composed and ordered by their cards.
        strategy: single | ddp | zero1 | zero2 | zero3 | fsdp2 | auto, or anything Lightning knows.
        devices: Per node: a number, a list, or "auto".
        num_nodes: How many nodes take part.
        seed: Of the order of samples and of everything random in techniques.
        run_dir: The run's home (checkpoints/, events/, summary.json, final/); the same command with the same
            run_dir resumes, and the run is called as it is. None makes a new one under runs/, called as the module's
            class.
        resume: "auto", "must" (fail if there is nothing to resume) or False (start over only where nothing is).
        ledger: Index the run in the user's ledger.
        wandb: "offline", "online", a mapping with mode and project, or None.
        checkpoint_every: A duration such as "10 min" or "500 steps"; "auto": what costs least, by what saving costs and
            how often runs are interrupted; None saves at the first and the last step only.
        offload: none | optimizer | parameters: what ZeRO keeps in host memory. A strategy object has its own.
        nvme: A folder on a local drive that zero3 with offload "optimizer" keeps the state in, in place of host memory.
        sharding: How ZeRO sums gradients, and how much it communicates at once. A strategy object has its own.
        mtbf: Mean seconds between failures and preemptions, for "auto"; None: a day for each node at first.
        keep_checkpoints: How many of the newest stay.
        best: Keep the weights of the best evaluation too, in best/: "max val_accuracy", "min val_loss".
        patience: End the run after so many evaluations without a better one by `best`.
        usd_per_device_hour: What a device costs; None takes the catalogue's price of this machine's, if it has one.
        watts_per_device: What a device draws under load, for energy where no counter can be read.
        log_every: Steps between rows in the journal.
        hang_after: End the run where it has not moved for so long ("10 min", or "off"), and say which rank stands
            where. "auto" is 20 times the slowest batch of the last hundred, at least two minutes.
        nonfinite_steps: A step whose gradients are not finite is skipped; so many, or as many losses, end the run.
        accept_changes: Resume with other techniques or another optimizer than the run was begun with, too.
        step_in_backward: Each parameter steps as soon as backward has its gradient: one of them is alive at a time.
        records: Where the run is written down, if not as `run_dir`, `ledger` and `wandb` say.
        **lightning: All other arguments of `pl.Trainer`.

    Raises:
        IncompatibleTechniques: Techniques do not go together, or not with this run.
        UnknownStrategy: `offload` or `sharding` asks for what the strategy does not have, or is not ours to set.

    Example:
        >>> from shoestring.callbacks import RigL
        >>> trainer = Trainer(Budget(steps=100), [RigL(sparsity=0.9)], accelerator="cpu", ledger=False)
        >>> [technique.card.name for technique in trainer.composition.techniques]
        ['lr_schedule', 'rigl']
    """

    def __init__(
        self,
        budget: Budget | None = None,
        techniques: Sequence[Technique] = (),
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        seed: int = 0,
        run_dir: str | os.PathLike[str] | None = None,
        resume: Literal["auto", "must", False] = "auto",
        ledger: bool = True,
        wandb: str | Mapping[str, Any] | bool | None = None,
        checkpoint_every: str | None = "5 min",
        *,
        offload: str = "none",
        nvme: str | os.PathLike[str] | None = None,
        sharding: Sharding | None = None,
        mtbf: float | None = None,
        keep_checkpoints: int = 2,
        best: str | None = None,
        patience: int | None = None,
        usd_per_device_hour: float | None = None,
        watts_per_device: float | None = None,
        log_every: int = 10,
        hang_after: str = "auto",
        nonfinite_steps: int = 10,
        accept_changes: bool = False,
        step_in_backward: bool = False,
        records: Records | None = None,
        **lightning: Unpack[LightningOptions],
    ) -> None:
        options: dict[str, Any] = {**lightning}
        budget = budget or Budget()
        kind = accelerator(options.get("accelerator", "auto"))
        if devices == "auto" and kind == "cpu":
            devices = 1
        name = strategy_name(strategy, devices, num_nodes)
        own_schedule = budget and not any(t.card.name == "lr_schedule" for t in techniques)
        chosen = [*techniques, _default_schedule()] if own_schedule else list(techniques)
        composition = compose(
            chosen, run_facts(name, kind, offload, in_backward=step_in_backward, nvme=nvme is not None)
        )
        settings = fold(composition.techniques, options)
        made = make_strategy(
            name, accelerator=kind, offload=offload, settings=settings, sharding=sharding, in_backward=step_in_backward,
            nvme=None if nvme is None else os.fspath(nvme),
        )  # fmt: skip
        if name == "fsdp2":
            options["inference_mode"] = False  # weights that are gathered in it could not be trained
        if budget and not options.keys() & {"max_epochs", "max_steps"}:
            options["max_epochs"] = math.ceil(budget.epochs or -1)
        self.seed = seed
        self.batches_planned = False  # micro-batches and accumulation have been chosen for this number of ranks
        self.records = records or Records(run_dir, ledger=ledger, wandb=wandb)
        self.composition = composition
        self.monitor = Monitor(
            budget,
            seed=seed,
            records=self.records,
            resume=resume,
            checkpoint_every=checkpoint_every,
            keep=keep_checkpoints,
            best=best,
            patience=patience,
            mtbf=mtbf,
            strategy=name if isinstance(name, str) else type(name).__name__,
            usd_per_device_hour=_price() if usd_per_device_hour is None else usd_per_device_hour,
            watts_per_device=watts_per_device,
            log_every=log_every,
            hang_after=hang_after,
            nonfinite_steps=nonfinite_steps,
            accept_changes=accept_changes,
        )
        clip = options.get("gradient_clip_val")
        stepping = in_backward(name, settings, clip, self.monitor.nonfinite) if step_in_backward else []
        given = options.pop("callbacks", None) or []
        given = [given] if isinstance(given, pl.Callback) else list(given)
        options.setdefault("logger", False)
        for quiet, callback_class in _SHOWN_OR_KEPT.items():
            options.setdefault(quiet, any(isinstance(callback, callback_class) for callback in given))
        if num_nodes == 1 and local_ranks.by_hand_in_slurm():
            options["plugins"] = started_by_hand(options.get("plugins"))
        super().__init__(
            strategy=made,
            devices=devices,
            num_nodes=num_nodes,
            precision=settings.precision,
            accumulate_grad_batches=settings.accumulate_grad_batches,
            callbacks=[*given, *composition.techniques, *stepping, self.monitor],
            **options,
        )
        self.fit_loop.__class__ = _EndedLoop
        for loop in (self.validate_loop, self.test_loop):
            evaluate_evenly(self, loop, seed)
        # Lightning's handlers communicate where a signal happens to come, and end an unfinished run with 0
        self._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        local_ranks.leash()
        # last, so that it sees what all others have done to a step; only Lightning's own checkpoints come after it
        self.callbacks.sort(key=lambda c: 2 * isinstance(c, Checkpoint) + (c is self.monitor))  # type: ignore[attr-defined]
        if self.num_devices * self.num_nodes > 1:
            self.callbacks.append(Stragglers(self.monitor))  # type: ignore[attr-defined]

    @property
    def summary(self) -> dict[str, Any]:
        """The cost and the result of the last `fit`."""
        return self.monitor.summary

    def fit(
        self,
        model: pl.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        *,
        startup_seconds: float = 0.0,
    ) -> None:
        """Train, to the end of the budget; resumes from `run_dir` where there is something to resume.

        Args:
            model: As `pl.Trainer.fit` takes it, like what follows.
            train_dataloaders: Batches to train on.
            val_dataloaders: Batches to validate on.
            datamodule: Instead of these two.
            ckpt_path: A checkpoint of Lightning's own to begin with.
            weights_only: How Lightning reads it.
            startup_seconds: Spent before this call, to be charged to the run.

        Raises:
            SystemExit: 85 after a signal, when everything is saved and the same command should run again.
        """
        self.monitor.begin(startup_seconds)
        self._same_global_batch()
        if self.monitor.totals.peak_flops is None and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            self.monitor.totals.peak_flops = peak(dtype(str(self.precision)), machine_facts().hardware)[0]
        if self.num_nodes == 1:
            local_ranks.leave_taken_port()
        will_launch()
        try:
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)  # type: ignore[arg-type]
        except Exception as error:
            if self.monitor.stopping.asked_before_training():  # another rank has ended by the same request
                raise preempted() from None
            if self.num_devices * self.num_nodes > 1 and is_lost_rank(error):
                if self.monitor.failed_first == self.global_rank:  # nobody else has said anything
                    log.error("rank %d has lost another rank: it was killed or is out of reach", self.global_rank)
                raise RankLost from None
            raise

    def saved_state(self, key: str) -> dict[str, Any] | None:
        """Return what the checkpoint of this resume holds of the callback `key`, before any model is restored.

        Collective; for callbacks that in `setup` give the module the shapes it was saved in. None: nothing to resume.
        """
        state = None
        if self.is_global_zero and self.monitor.resume and self.records.given is not None:
            with suppress(checkpoint.DamagedCheckpoint):  # the monitor reports it, on all ranks
                root = Path(self.records.given) / "checkpoints"
                checkpoint.complete_interrupted(root)  # or it would be resumed in shapes that are not its own
                folder, _ = checkpoint.newest_intact(root, check)
                state = checkpoint.read_state(folder / "state.pt")["callbacks"].get(key) if folder else None
        return self.strategy.broadcast(state)

    def _same_global_batch(self) -> None:
        """Resumed on another number of ranks: accumulate more or less, so that every step sees the same samples."""
        if not self.monitor.resume or self.records.given is None or self.batches_planned:
            return
        root = Path(self.records.given) / "checkpoints"
        for step in reversed(checkpoint.steps(root)):
            try:
                manifest = checkpoint.read_manifest(root / f"{step:09d}")
            except checkpoint.DamagedCheckpoint:
                continue
            before, now = manifest["world_size"], self.num_devices * self.num_nodes
            accumulate = manifest["accumulate"] * before
            if before != now and manifest["global_batch"] is not None:
                if accumulate % now:
                    raise CannotResume(
                        f"{manifest['global_batch']} samples a step, in micro-batches of "
                        f"{manifest['global_batch'] // accumulate}, do not divide among {now} ranks; "
                        f"use a number of ranks that divides {accumulate}"
                    )
                self.accumulate_grad_batches = accumulate // now
            return


class _EndedLoop(_FitLoop):
    """Lightning leaves a run at its `max_steps` at once; a resumed one may still lack its final weights and summary."""

    @property
    def skip(self) -> bool:
        resumed = self.trainer.monitor.resumed_from is not None  # type: ignore[attr-defined]
        return super().skip if not resumed or self.trainer.limit_train_batches == 0 else self.max_batches == 0


def _default_schedule() -> LRSchedule:
    """The schedule of a budget where nobody has chosen one."""
    schedule = LRSchedule()
    schedule.gives_way = True
    return schedule


def _price() -> float:
    name = machine_facts().hardware
    return hardware(name).usd_per_hour or 0.0 if name else 0.0
