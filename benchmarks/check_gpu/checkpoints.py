"""Step `checkpoint`: where the time of a checkpoint goes, and how long training stands still for one."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from checks import Checks, main
from random_tokens import LLAMA_HALF_B, TINY, recipe_of, run

from shoestring.trainer.checkpoint import hashed_files
from shoestring.trainer.checkpoint.snapshot import Snapshot

SPENT: Counter[str] = Counter()  # seconds


class Timed:
    """A sha256 that notes how long it takes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, part: Any) -> None:
        began = time.perf_counter()
        self._digest.update(part)
        SPENT["hash"] += time.perf_counter() - began

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class TimedOs:
    """What `hashed_files` uses of `os`."""

    @staticmethod
    def fsync(number: int) -> None:
        began = time.perf_counter()
        os.fsync(number)
        SPENT["fsync"] += time.perf_counter() - began


class TimedHashlib:
    sha256 = Timed


class Stalls(pl.Callback):
    """How long each save holds training up: the first waits until all is on the disk, those amid the run do not."""

    def __init__(self) -> None:
        self.seconds: list[tuple[int, float, bool]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        checkpoints, plain = trainer.monitor.checkpoints, trainer.monitor.checkpoints.save

        def save(trainer: Any, module: Any, wait: bool = False) -> None:
            began = time.perf_counter()
            plain(trainer, module, wait)
            self.seconds.append((trainer.global_step, time.perf_counter() - began, not checkpoints.under_way))

        checkpoints.save = save


def checkpoint(checks: Checks) -> None:
    written, take = hashed_files.write_hashed, Snapshot.take

    def timed_write(path: Path, parts: Any) -> Any:
        began, before = time.perf_counter(), SPENT["hash"] + SPENT["fsync"]
        about = written(path, parts)
        SPENT["write"] += time.perf_counter() - began - (SPENT["hash"] + SPENT["fsync"] - before)
        SPENT["bytes"] += about["bytes"]
        return about

    def timed_take(self: Snapshot, pieces: Any) -> Any:
        began = time.perf_counter()
        taken = take(self, pieces)
        SPENT["copy"] += time.perf_counter() - began
        SPENT["copies"] += 1
        return taken

    from shoestring.trainer.checkpoint import format as files

    files.write_hashed, Snapshot.take = timed_write, timed_take  # type: ignore[attr-defined, method-assign]
    hashed_files.hashlib, hashed_files.os = TimedHashlib, TimedOs  # type: ignore[assignment]
    length, batch = (1024, 4) if checks.cuda else (32, 4)
    steps = 24 if checks.cuda else 8
    recipe = recipe_of(
        "checkpoint", LLAMA_HALF_B if checks.cuda else TINY, length=length, batch=batch, steps=steps,
        precision="bf16", strategy={"name": "single"}, checkpoint={"every": f"{steps // 2} steps", "keep": 1},
    )  # fmt: skip
    stalls = Stalls()
    made, summary = run(recipe, "run", stalls, saves=True)
    waited = [seconds for _, seconds, waits in stalls.seconds if waits]
    amid = [seconds for _, seconds, waits in stalls.seconds if not waits]
    gigabytes = SPENT["bytes"] / 1e9
    checks.figure(
        parameters=made.fitted.inputs.size.parameters, gigabytes_written=gigabytes, saves=SPENT["copies"],
        copy_seconds=SPENT["copy"], write_seconds=SPENT["write"], fsync_seconds=SPENT["fsync"],
        hash_seconds=SPENT["hash"], stall_waited=waited, stall_in_the_background=amid,
    )  # fmt: skip
    checks.holds("every part was timed", all(SPENT[part] > 0 for part in ("copy", "write", "fsync", "hash")))
    checks.holds("saves amid the run were made in the background", len(amid) >= 1 and len(waited) >= 1)
    checks.holds("the run has ended", summary["steps"] == steps)
    checks.holds_on_cuda(
        "one in the background holds training up for at most a fifth", lambda: max(amid) <= 0.2 * max(waited),
        "CUDA: a tiny state is written as fast as it is copied",
    )  # fmt: skip


if __name__ == "__main__":
    main({"checkpoint": checkpoint})
