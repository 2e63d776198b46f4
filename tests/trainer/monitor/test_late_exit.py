"""A stopped run leaves at once, whatever the ledger and W&B do; what they missed they get later."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
from processes import succeed
from small import QUIET, Small, loader
from wandb_reader import history

from shoestring.trainer import Budget, Ledger, Trainer
from shoestring.trainer.machine.signals import Preempted
from shoestring.trainer.monitor.records import LEAVING

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class StopAt(pl.Callback):
    """Asks to stop after a step; `then` comes first."""

    def __init__(self, step: int, then: Any = None) -> None:
        self.step, self.then, self.requested_at = step, then or (lambda: None), 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.then()
            self.requested_at = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, *callbacks: pl.Callback, steps: int = 9, **options: Any) -> Trainer:
    trainer = Trainer(
        Budget(steps=steps), run_dir=folder / "run", accelerator="cpu", checkpoint_every="100 steps", log_every=1,
        callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(Small(), loader())
    return trainer


def stop(folder: Path, stopping: StopAt, **options: Any) -> float:
    """Seconds from the request to the end of the fit."""
    with pytest.raises(Preempted):
        train(folder, stopping, **options)
    return time.monotonic() - stopping.requested_at


def test_a_locked_ledger_is_not_waited_for_and_hears_of_the_run_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    other = sqlite3.connect(tmp_path / "home" / "ledger.sqlite", isolation_level=None)
    other.execute("PRAGMA journal_mode=WAL")
    other.execute("BEGIN IMMEDIATE")
    assert LEAVING <= stop(tmp_path, StopAt(5)) < LEAVING + 2
    assert "the ledger is busy" in caplog.text
    assert not Ledger().runs()
    other.execute("ROLLBACK")
    other.close()
    Ledger().refresh()
    (run,) = Ledger().runs()
    assert (run.status, run.steps) == ("preempted", 5)
    assert not list((tmp_path / "home" / "to-index").iterdir())


def test_a_run_that_was_killed_is_in_the_ledger_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                Ledger().refresh()
                listed.extend(Ledger().runs())

    listed: list[Any] = []
    train(tmp_path, Look())
    assert [run.status for run in listed] == ["running"], "while it runs, and whatever its end will be"


def stand_still(folder: Path) -> None:
    """Stop W&B's helper, once it is there."""
    end = time.monotonic() + 60
    while not list(folder.rglob("*.wandb")) and time.monotonic() < end:
        time.sleep(0.05)
    for child in psutil.Process().children():
        if "wandb" in child.name():
            child.suspend()
            (folder / "stood-still").touch()


def stopped_attempt(folder: Path) -> None:
    seconds = stop(folder, StopAt(5, lambda: stand_still(folder)), wandb="offline", ledger=False)
    (folder / "seconds").write_text(str(seconds))


def next_attempt(folder: Path) -> None:
    train(folder, wandb="offline", ledger=False)


def test_a_standing_helper_of_wandb_is_not_waited_for_and_its_rows_come_with_the_next_attempt(tmp_path: Path) -> None:
    succeed(stopped_attempt, tmp_path, world=1, folder=tmp_path)
    assert (tmp_path / "stood-still").exists()
    assert float((tmp_path / "seconds").read_text()) < LEAVING + 2
    assert (tmp_path / "run" / "wandb-missed").exists()
    succeed(next_attempt, tmp_path, world=1, folder=tmp_path)
    newest = max((tmp_path / "run").rglob("*.wandb"), key=os.path.getmtime)
    assert [row["step"] for row in history(newest) if "loss" in row] == list(range(1, 10))
    assert not (tmp_path / "run" / "wandb-missed").exists()
