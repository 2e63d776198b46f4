"""What a run tells of itself: its totals so far, the row of a step, and the closing summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, Timer
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from ...callbacks.accounting.account import Account
from ...callbacks.accounting.clock import Spend
from ...callbacks.accounting.meter import communication_bytes, peak_bytes


@dataclass
class Totals:
    """Reads an account aloud.

    Args:
        account: of this attempt.
        peak_flops: FLOP/s that a device can do, for the share of it that was used (MFU); None: not told.
        trainable: parameters that train.
    """

    account: Account
    peak_flops: float | None = None
    trainable: int = 0

    def so_far(self) -> dict[str, Any]:
        """Return what all attempts have cost."""
        spend = self.account.clock.spend
        return {
            "samples": spend.samples,
            "tokens": spend.tokens,
            "padding": spend.padding,
            "padding_share": spend.padding / max(1.0, spend.tokens + spend.padding),
            **_of_trained_tokens(spend),
            "seconds": spend.seconds,
            "device_seconds": spend.device_seconds,
            "usd": spend.usd,
            "kwh": spend.kwh,
            "kwh_source": self.account.spending.energy.source,
            "flops_counted": spend.flops_counted,
            "flops_realised": spend.flops,
            "mfu": self._mfu(),
        }

    def summary(self, trainer: pl.Trainer, strategy: str, peak: int) -> dict[str, Any]:
        """Totals of all attempts, rates of this one, and how it ended; peak: bytes of the rank that held the most."""
        account, seconds, work = self.account, self.train_seconds(), self.account.spending.this_attempt()
        size = 2 if "16" in str(trainer.precision) else 4
        per_epoch = account.clock.steps_per_epoch
        counts = self.trainable, size, trainer.world_size, trainer.accumulate_grad_batches
        sent = communication_bytes(strategy, *counts, _gradient_bytes(trainer))
        return {
            "steps": account.clock.step,
            "epochs": account.clock.step / per_epoch if per_epoch else None,
            **self.so_far(),
            "peak_bytes": peak,
            "tokens_per_second": work.tokens / seconds,
            "samples_per_second": work.samples / seconds,
            "data_wait": account.spending.data_wait / seconds,
            "comm_bytes": sent * work.steps,
            "windows": account.spending.windows.so_far(),
            "nonfinite_steps": account.nonfinite_steps,
            "stopped_by": account.stopped_by or _stopper(trainer, account),
            "budget": dict(account.budget.given()),
            "strategy": strategy,
            "world_size": trainer.world_size,
        }

    def train_seconds(self) -> float:
        return max(1e-9, self.account.spending.windows.spent("train"))

    def _mfu(self) -> float | None:
        """Counted FLOPs of this attempt's steps over what the devices could have done meanwhile."""
        if not self.peak_flops:
            return None
        counted = self.account.spending.this_attempt().flops_counted
        return counted / (self.train_seconds() * self.peak_flops * self.account.spending.world)


def _of_trained_tokens(spend: Spend) -> dict[str, float]:
    """How many tokens have carried loss, and what a million of them costs; what is not known is left out."""
    if not spend.trained_tokens:
        return {}
    price = {"usd_per_million_trained_tokens": 1e6 * spend.usd / spend.trained_tokens} if spend.usd else {}
    return {"trained_tokens": spend.trained_tokens, **price}


def _stopper(trainer: pl.Trainer, account: Account) -> str:
    """What has ended a run that its budget has not."""
    if not trainer.should_stop:
        return "epochs" if account.budget.epochs is not None else "max_epochs"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            return type(callback).__name__
        if isinstance(callback, Timer) and (callback.time_remaining() or 0) <= 0:
            return type(callback).__name__
    return "callback"


class StepRows:
    """The journal's line of a step, now and then: every `log_every` steps, and four times a second at least."""

    def __init__(self, totals: Totals, log_every: int) -> None:
        self.totals, self.log_every = totals, log_every
        self.loss: Any = None  # of this rank's micro-batches since the last step
        self._done = self._written = 0.0

    def start(self) -> None:
        self._done, self._written = self._amount(), perf_counter()

    def add_loss(self, outputs: Any, first: bool) -> None:
        """Lightning has divided a micro-batch's loss by their number: their sum is the step's mean."""
        # Lightning's loops give a dict, which is quickly told
        loss = outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs
        if loss is not None:
            self.loss = loss if first else self.loss + loss

    def scale_loss(self, factor: float) -> None:
        """The step had fewer micro-batches than Lightning has divided by."""
        self.loss = self.loss if self.loss is None else self.loss * factor

    def due(self) -> bool:
        return self.totals.account.clock.step % self.log_every == 0 or perf_counter() - self._written > 0.25

    def row(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The line; rates are since the last one, in tokens a second, or samples where there are none."""
        account, clock = self.totals.account, self.totals.account.clock
        now, done = perf_counter(), self._amount()
        rate = (done - self._done) / max(1e-9, now - self._written)
        self._done, self._written = done, now
        return {
            "step": clock.step,
            "loss": float(self.loss) if self.loss is not None else None,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "progress": clock.progress,
            "horizon": clock.horizon,
            "tokens_per_second" if clock.spend.tokens else "samples_per_second": rate,
            "data_wait": account.spending.data_wait / self.totals.train_seconds(),
            "peak_bytes": peak_bytes(trainer.strategy.root_device),
            **self.totals.so_far(),
        }

    def _amount(self) -> float:
        spend = self.totals.account.clock.spend
        return spend.tokens or spend.samples


def of_finished(now: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a finished run that was given again: what was reached and spent stays as it was `before`."""
    if before.get("steps") != now["steps"]:
        return now
    return now | dict(before) | {key: now[key] for key in ("resumed_from", "budget")}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Logged metrics as plain numbers."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, torch.Tensor | float | int)}


def _gradient_bytes(trainer: pl.Trainer) -> int:
    """Of an element as ranks sum it: DDP sums in what weights are kept in, ZeRO in what its engine was told."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    return 4 if engine is None else int(engine.communication_data_type.itemsize)
