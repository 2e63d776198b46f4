"""What a run tells of itself: the row of a step, its totals so far, and the closing summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from ...callbacks.accounting.clock import Clock
from ...callbacks.accounting.meter import communication_bytes, peak_bytes

if TYPE_CHECKING:
    from .monitor import Observer


def totals(observer: Observer) -> dict[str, Any]:
    """What all attempts have cost so far."""
    spend = observer.clock.spend
    return {
        "samples": spend.samples,
        "tokens": spend.tokens,
        "seconds": spend.seconds,
        "device_seconds": spend.device_seconds,
        "usd": spend.usd,
        "kwh": spend.kwh,
        "kwh_source": observer.energy.source,
        "flops_counted": spend.flops_counted,
        "flops_realised": spend.flops,
        "mfu": _mfu(observer),
    }


def row(observer: Observer, trainer: pl.Trainer, loss: Any, rate: float) -> dict[str, Any]:
    """One step's line in the journal; `rate` is in tokens a second, or samples where there are none."""
    spend = observer.clock.spend
    return {
        "step": observer.clock.step,
        "loss": float(loss) if loss is not None else None,
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "progress": observer.clock.progress,
        "horizon": observer.clock.horizon,
        "tokens_per_second" if spend.tokens else "samples_per_second": rate,
        "data_wait": observer.data_wait / _train_seconds(observer),
        "peak_bytes": peak_bytes(trainer.strategy.root_device),
        **totals(observer),
    }


def summary(observer: Observer, trainer: pl.Trainer, peak: int) -> dict[str, Any]:
    """Totals of all attempts, rates of this one, and how it ended; `peak` bytes are those of the greediest rank."""
    seconds, work = _train_seconds(observer), observer.this_attempt()
    size = 2 if "16" in str(trainer.precision) else 4
    sent = communication_bytes(
        observer.strategy, observer.trainable, size, trainer.world_size, trainer.accumulate_grad_batches
    )
    found = {
        "steps": observer.clock.step,
        **totals(observer),
        "peak_bytes": peak,
        "tokens_per_second": work.tokens / seconds,
        "samples_per_second": work.samples / seconds,
        "data_wait": observer.data_wait / seconds,
        "comm_bytes": sent * work.steps,
        "windows": dict(observer.windows.seconds),
        "stopped_by": observer.stopped_by or ("max_epochs" if not trainer.should_stop else "callback"),
        "budget": dict(observer.budget.given()),
        "strategy": observer.strategy,
        "world_size": trainer.world_size,
        "resumed_from": observer.resumed_from,
        "metrics": {**observer.metrics, **numbers(trainer.callback_metrics)},
        "run_dir": str(observer.records.run_dir),
    }
    if (goal := observer.goal) is not None:
        found["goal"] = {"metric": goal.metric, "above": goal.above, "below": goal.below}
        found["goal_reached"] = goal_reached(goal, found["metrics"])
    return found


def as_it_was(now: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a finished run that was given again: what was reached and spent stays as it was `before`."""
    if before.get("steps") != now["steps"]:
        return now
    return now | dict(before) | {key: now[key] for key in ("resumed_from", "budget")}


def goal_reached(goal: Any, metrics: Mapping[str, float]) -> bool | None:
    """Whether `goal` (metric, above, below) is met; None if there is none or its metric was never logged."""
    if goal is None or goal.metric not in metrics:
        return None
    value = metrics[goal.metric]
    return value > goal.above if goal.above is not None else value < goal.below


def nearest_limit(clock: Clock) -> str:
    """The limit of which the largest share is spent."""
    return max(clock.limits, key=lambda name: clock.spend.get(name) / clock.limits[name])


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Logged metrics as plain numbers."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, torch.Tensor | float | int)}


def _train_seconds(observer: Observer) -> float:
    return max(1e-9, observer.windows.spent("train"))


def _mfu(observer: Observer) -> float | None:
    """Counted FLOPs of this attempt's steps over what the devices could have done meanwhile."""
    if not observer.peak_flops:
        return None
    return observer.this_attempt().flops_counted / (_train_seconds(observer) * observer.peak_flops * observer.world)
