"""A trace of a few steps, for Perfetto: what the CPU and the GPU did, and when."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile

from ...callbacks.contract import silence

log = logging.getLogger("shoestring")

AFTER = 2  # steps: the first ones compile kernels, fill caches and count FLOPs


@silence
class Profile(pl.Callback):
    """Traces `steps` optimizer steps of every rank into `profile/rank<N>.json.gz` of the run's folder.

    Args:
        steps: How many.
        run_dir: The run's folder.
    """

    def __init__(self, steps: int, run_dir: Path) -> None:
        self.steps, self.folder = steps, run_dir / "profile"
        self._first: int | None = None
        self._running: profile | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._first is None:
            self._first = trainer.global_step
        if self._running is None and trainer.global_step == self._first + AFTER:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running = profile(activities=kinds, record_shapes=True, profile_memory=True)
            self._running.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._first is not None and trainer.global_step == self._first + AFTER + self.steps:
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first is not None and self._running is None and not self._written(trainer).exists():
            log.warning("tracking.profile: the run ended before step %d, where the trace begins", AFTER + 1)
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def _written(self, trainer: pl.Trainer) -> Path:
        return self.folder / f"rank{trainer.global_rank}.json.gz"

    def _write(self, trainer: pl.Trainer) -> None:
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        self.folder.mkdir(exist_ok=True)
        running.export_chrome_trace(str(self._written(trainer)))
        if trainer.is_global_zero:
            log.info("trace of %d steps in %s: open it at https://ui.perfetto.dev", self.steps, self._written(trainer))
