"""A run's epochs: the order of their samples, and what waits until one of them has ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.trainer.connectors.data_connector import _parse_num_batches
from pytorch_lightning.trainer.states import RunningStage

from ...callbacks.accounting.horizon import Horizon
from ...callbacks.sampling.global_batches import GlobalBatches
from ...callbacks.sampling.samples import install_sampler


class Epochs:
    """Asked by the monitor where a fit, training or an epoch begins.

    order: of training samples; None where the loader keeps its own.
    save_waits: a checkpoint is due after the epoch. What an epoch ends with, such as its evaluation and its schedulers,
        belongs to its last step.
    """

    def __init__(self) -> None:
        self.order: GlobalBatches | None = None
        self.save_waits = False
        self._since: tuple[int, int] | None = None  # of the order, in the checkpoint

    @property
    def global_batch(self) -> int | None:
        return None if self.order is None else self.order.global_batch

    def open(self, trainer: pl.Trainer, seed: int) -> None:
        """The fit has begun; nothing has been restored yet."""
        self.order, self.save_waits, self._since = install_sampler(trainer, seed), False, None

    def restored(self, trainer: pl.Trainer, horizon: Horizon) -> None:
        """Loader workers draw batches before training starts, and these ask the clock."""
        if self.order is None:
            return
        whole = _parse_num_batches(RunningStage.TRAINING, len(self.order), trainer.limit_train_batches)
        horizon.set_limits(trainer, whole)
        if self._since is not None:
            self.order.since = self._since

    def start(self, trainer: pl.Trainer) -> None:
        """Training begins, maybe amid an epoch: Lightning tells how it accumulates only where one begins."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(trainer)

    def begin(self, trainer: pl.Trainer, horizon: Horizon) -> None:
        if self.order is not None:
            self.order.begin_epoch(trainer.current_epoch)
        horizon.begin_epoch(trainer)

    @contextmanager
    def between(self, trainer: pl.Trainer) -> Iterator[None]:
        """Where an epoch begins, look as if it had not: a run resumed from here begins it with all its hooks."""
        self.save_waits, progress = False, trainer.fit_loop.epoch_progress
        for counts in (progress.total, progress.current):
            counts.ready -= 1
        yield
        for counts in (progress.total, progress.current):
            counts.ready += 1

    def end(self, trainer: pl.Trainer) -> None:
        """What was measured in an epoch is there, in a resumed one too, so schedulers that wait for it may step."""
        trainer.fit_loop._restarting = False

    def state_dict(self) -> dict[str, Any]:
        return {} if self.order is None else {"since": list(self.order.since)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._since = (int(state["since"][0]), int(state["since"][1])) if state else None
