"""Ends a run that no longer moves, and says which rank stands where.

A rank that is stopped, or waits for a disk or a loader that does not answer, lets every other wait in its next
collective: until the process group's own limit, half an hour, and then nobody says whom it has waited for. A loader
that hangs is never noticed at all. So a thread of every rank looks once a second at what the run has counted; where
that has not changed for too long, each rank writes into its journal where its main thread stands, the first of them
tells which rank the others wait for, and all end. The step itself does nothing for it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from ...callbacks.accounting.account import Account
from ...callbacks.accounting.clock import BadDuration, Duration
from ...exits import FAILURE
from ..ledger import read
from .records import Records

log = logging.getLogger("shoestring")

LOOK_EVERY = 1.0  # seconds
TIMES = 20  # the slowest of the last batches, and still no other: it will not come
LEAST = 120.0  # seconds; below that a busy file system would be a hang
UNKNOWN = 1800.0  # seconds, where nothing of the kind has been measured: a first batch, a checkpoint
REMEMBERED = 100  # batches
HEAR = 3.0  # seconds in which all ranks have written down where they stand
_COLLECTIVE = "a collective, for another rank"
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "accounting/agreement.py")
_INNER = 6  # frames, counted from the inner end: wrappers of a collective


def limit(hang_after: str) -> float | None:
    """Seconds of `auto` (None, for what is measured), `off` (infinity) or a duration such as "10 min".

    Raises:
        BadDuration: For anything else.
    """
    if hang_after in ("auto", "off"):
        return None if hang_after == "auto" else float("inf")
    duration = Duration.parse(hang_after)
    if duration.counts != "seconds" or duration.amount <= 0:
        raise BadDuration(f"hang_after {hang_after!r}: write auto, off, or a time such as '10 min'")
    return duration.amount


@dataclass(frozen=True)
class Standing:
    """Where a rank stands: what it waits for, and its stack."""

    waits_for: str
    stack: str


def standing(frames: Sequence[traceback.FrameSummary]) -> Standing:
    """Read a stack, the innermost frame last."""
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    where = own[-1] if own else frames[-1]
    files = [frame.filename.replace(os.sep, "/") for frame in frames]
    if any(part in file for file in files[-_INNER:] for part in _COLLECTIVES):
        place = _COLLECTIVE
    elif any("torch/utils/data/" in file for file in files):
        place = "its next batch"
    else:
        place = "backward, or another rank in it" if "torch/autograd/" in files[-1] else "code"
    at = f"{Path(where.filename).name}:{where.lineno} in {where.name}"
    return Standing(f"{place} ({at})", "".join(traceback.format_list(list(frames))))


class HangWatch:
    """Watches this rank while it trains.

    Args:
        account: Whose counts move.
        records: Where the standing is written, and read of the other ranks.
        hang_after: `auto`, `off` or a time: see `limit`.
    """

    def __init__(self, account: Account, records: Records, hang_after: str) -> None:
        self.account, self.records, self._limit = account, records, limit(hang_after)
        self._usual: dict[str, deque[float]] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, rank: int, world: int) -> None:
        """From the main thread: training begins."""
        if self._limit == float("inf"):
            return
        self._closing = threading.Event()
        self._rank, self._world, self._main = rank, world, threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="shoestring-hang", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._closing.set()

    def _counts(self) -> tuple[Any, ...]:
        spending = self.account.spending
        window = spending.windows.current
        return (
            window,
            self.account.clock.step,
            spending.mine.samples,
            spending.data_wait,
            self.account.evaluation.batches,
        )

    def _watch(self) -> None:
        closing, seen = self._closing, self._counts()
        moved = looked = monotonic()
        while not closing.wait(LOOK_EVERY):
            now, counts = monotonic(), self._counts()
            if now - looked > 5 * LOOK_EVERY:  # this process itself has been stopped
                moved = now
            elif counts != seen:
                self._usual.setdefault(seen[0], deque(maxlen=REMEMBERED)).append(now - moved)
                seen, moved = counts, now
            elif now - moved > self._allowed(seen[0]):
                self._end(now - moved)
            looked = now

    def _allowed(self, window: str) -> float:
        if self._limit is not None:
            return self._limit
        usual = self._usual.get(window) if window in ("train", "evaluation") else None
        return max(LEAST, TIMES * max(usual)) if usual else UNKNOWN

    # -- the end ------------------------------------------------------------------------------------------------------
    def _end(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._main)
        mine = standing(traceback.extract_stack(frame))
        step = self.account.clock.step
        self.records.event(
            "hang", step=step, after_seconds=round(seconds, 1), waits_for=mine.waits_for, stack=mine.stack
        )
        self.records.sync()
        sleep(HEAR)
        reports = self._reports() or {self._rank: {"waits_for": mine.waits_for, "stack": mine.stack, "step": step}}
        if self._rank == min(reports):
            reason = verdict(reports, self._world, step, seconds)
            log.error("%s", reason)
            self.records.event("error", step=step, reason=reason)
            self.records.sync()
        else:
            sleep(HEAR)  # or a launcher would end the one that tells
        os._exit(FAILURE)

    def _reports(self) -> dict[int, dict[str, Any]]:
        """Rank -> where it stands, of all that have written it down in this attempt."""
        rows = read(self.records.run_dir / "events")
        hangs = [row for row in rows if row.kind == "event" and row.fields.get("event") == "hang"]
        last = max((row.attempt for row in hangs), default=0)
        return {row.rank: dict(row.fields) for row in hangs if row.attempt == last}


def verdict(reports: dict[int, dict[str, Any]], world: int, step: int, seconds: float) -> str:
    """What has happened, in a sentence for each rank that the others wait for."""
    silent = [rank for rank in range(world) if rank not in reports]
    others = {rank: row for rank, row in reports.items() if not row["waits_for"].startswith(_COLLECTIVE)}
    said = [f"the run has not moved for {seconds:.0f} s, after step {step}"]
    said += [f"rank {rank} does not answer: its process is stopped or gone" for rank in silent]
    if not silent:
        named = others or reports
        said += [
            f"rank {rank} waits for {row['waits_for']}, after its step {row['step']}" for rank, row in named.items()
        ]
        said += [f"the stack of rank {rank}:\n{row['stack']}" for rank, row in named.items()]
    return ". ".join(said).rstrip() + "\nThe same command goes on from the last checkpoint. The limit is hang_after."
