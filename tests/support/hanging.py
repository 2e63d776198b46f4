"""Trainings in which something no longer moves."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytorch_lightning as pl
from torch.utils.data import DataLoader
from toy import Words, held_out, toy

from shoestring.trainer import Trainer


class Stuck(Words):
    """Reading its last sample never ends."""

    def __getitem__(self, index: int) -> dict:
        if index == len(self) - 1:
            threading.Event().wait()
        return super().__getitem__(index)


class Stopped(pl.Callback):
    """Rank 1's process is stopped at step 3, and goes on long after the others have given up."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            subprocess.Popen(["sh", "-c", f"sleep 12; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)


def train(folder: Path, what: str, world: int, workers: int = 0) -> None:
    words = Stuck(24) if what == "sample" else Words(48)
    Trainer(
        max_steps=100, max_epochs=-1, accelerator="cpu", strategy="ddp" if world > 1 else "single", devices=world,
        run_dir=folder / "run", ledger=False, hang_after="2 s", callbacks=[Stopped()] if what == "rank" else [],
    ).fit(toy(), DataLoader(words, batch_size=4, num_workers=workers), held_out())  # fmt: skip
    sys.exit("it has ended")
