"""Signals between the moments that everybody tests: in the sanity check, while techniques start, after the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from processes import last_words, run
from small import QUIET, Small, loader

from shoestring.exits import AGAIN, FAILURE, with_parent
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.machine import signals
from shoestring.trainer.machine.signals import Preempted

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]
STEPS = 12


class Signal(pl.Callback):
    """Sends a signal to this process in one hook, on one rank."""

    def __init__(self, hook: str, rank: int = 0, name: str = "SIGTERM") -> None:
        self.rank, self.number, self.sent = rank, getattr(signal, name), False
        setattr(self, hook, self._send)

    def _send(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


class StopAt(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            raise InterruptedError


def train(folder: Path, *callbacks: pl.Callback, **options: Any) -> Trainer:
    trainer = Trainer(
        Budget(steps=STEPS), run_dir=folder, accelerator="cpu", checkpoint_every="2 steps", ledger=False,
        callbacks=list(callbacks), num_sanity_val_steps=2, **options,
    )  # fmt: skip
    trainer.fit(Small(), loader(), loader(shuffle=False))
    return trainer


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("0*"))


BEFORE_TRAINING = ["on_sanity_check_start", "on_validation_batch_start", "on_sanity_check_end", "on_train_start"]


@pytest.mark.parametrize("hook", BEFORE_TRAINING)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_before_the_first_step_ends_with_85_and_without_a_step(hook: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(Preempted) as stopped:
        train(tmp_path, Signal(hook, name=name))
    assert stopped.value.code == AGAIN
    assert not steps(tmp_path) and not (tmp_path / "final").exists()
    assert train(tmp_path).summary["steps"] == STEPS


def test_a_resumed_run_that_is_stopped_as_it_starts_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        train(tmp_path, StopAt())
    with pytest.raises(Preempted) as stopped:
        train(tmp_path, Signal("on_train_start"))
    assert stopped.value.code == AGAIN and not (tmp_path / "summary.json").exists()
    summary = train(tmp_path).summary
    assert (summary["resumed_from"], summary["steps"]) == (2, STEPS)


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    train(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def one_rank_is_told(folder: Path, hook: str) -> None:
    try:
        train(folder, Signal(hook, rank=1), strategy="ddp", devices=2)
    except Preempted as stopped:
        os._exit(int(str(stopped.code)))


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_train_start"])
def test_told_to_one_rank_before_training_all_ranks_end_with_85(hook: str, tmp_path: Path) -> None:
    assert run(one_rank_is_told, tmp_path / "run", hook, world=2, folder=tmp_path) == [AGAIN, AGAIN], last_words(
        tmp_path
    )


CHILD = "import sys, time; sys.stdout.write('up\\n'); sys.stdout.flush(); time.sleep(60)"
PARENT = f"""
import subprocess, sys, time
from shoestring.exits import with_parent
child = subprocess.Popen(with_parent([sys.executable, "-c", {CHILD!r}]))
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("wait", [True, False], ids=["running", "starting"])
def test_what_is_started_on_a_leash_ends_with_its_parent(wait: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if wait:
            assert parent.stdout.readline() == "up\n"
        parent.kill()
    end = time.monotonic() + 20
    while (alive := _alive(child)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_leash_needs_its_parent() -> None:
    """Where the parent has gone before the leash was on, nothing is started."""
    command = with_parent([sys.executable, "-c", "print('started')"])
    command[command.index(str(os.getpid()))] = "1"
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


# -- the disk --------------------------------------------------------------------------------------------------------
@pytest.fixture
def disk(tmp_path: Path):
    """A file system of 3 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "shoestring-test", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


class Refuse(pl.Callback):
    """The checkpoints' disk becomes read-only or full after `step`, and a signal comes two steps later."""

    def __init__(self, disk: Path, how: str, step: int) -> None:
        self.disk, self.how, self.step = disk, how, step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.monitor.checkpoints.complete(trainer)  # what is being written is whole before
        if trainer.global_step == self.step and self.how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", self.disk], check=True)
        elif trainer.global_step == self.step:
            with (self.disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(b"x" * 4096)
        if trainer.global_step == self.step + 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("how", "reason"), [("read-only", "Read-only file system"), ("full", "No space left on device")]
)
def test_a_stop_says_what_is_saved_and_what_is_not(how: str, reason: str, disk: Path, tmp_path: Path, caplog) -> None:
    home = tmp_path / "run"
    home.mkdir()
    (home / "checkpoints").symlink_to(disk)
    with pytest.raises(Preempted) as stopped:
        train(home, Refuse(disk, how, 4))
    assert stopped.value.code == AGAIN, "some steps of this attempt are saved"
    said = caplog.messages[-1]
    newest = steps(home)[-1]
    assert 1 < newest <= 4
    assert f"step 6 could not be saved ({reason})" in said and f"step {newest} is the newest that is saved" in said
    with pytest.raises(Preempted) as stopped:  # it resumes, but nothing can be kept
        train(home, Signal("on_train_batch_end"))
    assert stopped.value.code == FAILURE, "given again at once it would stop at the same place for ever"
    assert f"({reason})" in caplog.messages[-1] and f"step {newest} is the newest that is saved" in caplog.messages[-1]
    rows = [json.loads(line) for path in (home / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
    (error,) = [row for row in rows if row.get("event") == "error"]
    assert reason in error["reason"]


@pytest.mark.parametrize(("local_rank", "launched"), [(None, False), ("0", False), ("1", True)])
def test_a_run_that_a_trained_process_starts_is_no_rank_of_its(local_rank, launched, monkeypatch) -> None:
    """It would end with 0 where it is asked to stop."""
    monkeypatch.setenv("SHOESTRING_LAUNCHER", str(os.getppid()))
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert signals.launched_here() is launched
    assert signals.preempted().code == (0 if launched else 85)
