"""Writing the journal: the record of truth of a run, one append-only file per attempt and rank.

A row is on its way to the disk when `write` returns: it survives the death of the process at once, and the death of
the machine once the background thread has called fsync (every `fsync_every` seconds) or `sync` has returned. Nothing
that goes wrong with the disk stops the training: rows wait in memory, are tried again, and are counted if lost.
The line format and the reader are in `lines.py`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic, time

from ... import ShoestringError
from ...files import sync_directory
from . import lock
from .lines import (
    KINDS,
    RESERVED,
    JournalProblem,
    Row,
    finite,
    next_attempt,
    plain,
    read,
    resume_point,
    seal,
    segment_name,
)

__all__ = ["Journal", "JournalError", "JournalProblem", "Row", "next_attempt", "read"]

BUFFER_BYTES = 8 << 20  # rows kept in memory while the disk refuses them: some 20,000
ALIVE_EVERY = 5.0  # seconds of silence after which a row says that the process lives
LOCK_NAME = "writer.lock"

log = logging.getLogger("shoestring.ledger")


class JournalError(ShoestringError):
    """The journal cannot be opened, or a row is of no known kind."""


class Journal:
    """Append rows to `directory/events-a{attempt}-r{rank}.jsonl`.

    Opening creates the folder, cuts off an unfinished last line, and goes on after the last row; rank 0 also takes
    the run's lock. Raises `JournalError` if the folder cannot be written and `RunBusy` if another process writes it;
    after that no call raises because of the disk.

    `fsync_every` is in seconds; 0 or less makes each `write` wait for the disk. Safe to call from several threads.
    """

    def __init__(self, directory: Path, *, rank: int, attempt: int, fsync_every: float = 1.0) -> None:
        self.path = Path(directory) / segment_name(attempt, rank)
        self.lost = 0  # rows that never reached the disk
        self._every = fsync_every
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dirty = self._warned = self._locked = False
        self._guard = threading.RLock()
        self._encode = json.JSONEncoder(
            separators=(",", ":"), allow_nan=False, check_circular=False, default=plain
        ).encode
        self._fd = self._open(rank, attempt)
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="shoestring-journal", daemon=True)
        self._keeper.start()

    def _open(self, rank: int, attempt: int) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                lock.acquire(self.path.with_name(LOCK_NAME), f"process {os.getpid()} on {socket.gethostname()}")
                self._locked = True
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._size, self._seq = resume_point(self.path)
            os.ftruncate(fd, self._size)
            sync_directory(self.path.parent)
        except OSError as error:
            self._unlock()
            raise JournalError(
                f"cannot write the journal {self.path}: {error.strerror}. Fix that or choose another run directory."
            ) from None
        return fd

    def write(self, kind: str, /, **fields: object) -> None:
        """Append one row of a kind in `KINDS`; NaN and infinities become null, `seq=` and its like get a `_` behind.

        Some 15 microseconds for a dozen floats. Tensors and NumPy values are written as numbers: a copy to the host.
        """
        if kind not in KINDS:
            raise JournalError(f"no row of kind {kind!r}: choose one of {', '.join(sorted(KINDS))}.")
        if not RESERVED.isdisjoint(fields):
            fields = {f"{key}_" if key in RESERVED else key: value for key, value in fields.items()}
        try:
            body = self._encode(fields)
        except Exception:
            body = self._encode(_writable(fields))
        body = body[1:-1]
        with self._guard:
            head = '{"seq":%d,"t":%.6f,"mono":%.6f,"kind":"%s"' % (self._seq, time(), monotonic(), kind)  # noqa: UP031
            self._seq += 1
            line = seal(f"{head},{body}" if body else head)
            # behind rows that wait, so that the order on disk is the order of writing
            if self._waiting or not self._put(line):
                self._defer(line)
        if self._every <= 0:
            self.sync()

    def sync(self) -> bool:
        """Try again what is waiting and force all rows to the disk; whether every row is there now."""
        with self._guard:
            self._drain()
            safe = self._fsync()
            return safe and not self._waiting and not self.lost

    def close(self) -> int:
        """Sync and close; the number of rows lost, which is 0 unless the disk refused them to the end."""
        with self._guard:
            if self._fd < 0:
                return self.lost
            self.sync()
            self._closing.set()
            self.lost += len(self._waiting)
            self._waiting.clear()
            os.close(self._fd)
            self._fd = -1
            self._unlock()
        if self.lost:
            log.warning("%s: %d rows were lost because the disk could not be written", self.path, self.lost)
        return self.lost

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _defer(self, line: bytes) -> None:
        if self._fd < 0:
            self.lost += 1
            return
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        while self._waiting_bytes > BUFFER_BYTES:
            # totals in a row are cumulative, so the newest rows say most
            self._waiting_bytes -= len(self._waiting.popleft())
            self.lost += 1

    def _put(self, line: bytes) -> bool:
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            self._complain(error)
            return False
        if written == len(line):
            self._size += written
            self._dirty = True
            return True
        # a full disk takes the first bytes of a line: take them back, so that the line can be written whole later
        self._complain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with suppress(OSError):
            os.ftruncate(self._fd, self._size)
        return False

    def _drain(self) -> None:
        while self._waiting and self._fd >= 0 and self._put(self._waiting[0]):
            self._waiting_bytes -= len(self._waiting.popleft())

    def _keep(self) -> None:
        """The background thread: fsync may take seconds while a checkpoint is written, so no step waits for it.

        In a long step or evaluation it says now and then that the process lives: were it killed, its time is known.
        """
        written, since = self._seq, monotonic()
        while not self._closing.wait(self._every if self._every > 0 else 1.0):
            if self._seq != written:
                written, since = self._seq, monotonic()
            elif monotonic() - since >= ALIVE_EVERY:
                self.write("event", event="alive")
            with self._guard:
                self._drain()
                descriptor = os.dup(self._fd) if self._dirty and self._fd >= 0 else -1
                self._dirty = False
            if descriptor >= 0:
                self._force(descriptor)
                os.close(descriptor)

    def _fsync(self) -> bool:
        if self._fd < 0:
            return False
        self._dirty = False
        return self._force(self._fd)

    def _force(self, descriptor: int) -> bool:
        try:
            os.fsync(descriptor)
        except OSError as error:
            self._complain(error)
            return False
        return True

    def _complain(self, error: OSError) -> None:
        if not self._warned and self._fd >= 0:
            self._warned = True
            log.warning(
                "%s: %s. Training continues; the rows stay in memory and are written later.", self.path, error.strerror
            )

    def _unlock(self) -> None:
        if self._locked:
            self._locked = False
            lock.release(self.path.with_name(LOCK_NAME))


def _writable(fields: Mapping[str, object]) -> object:
    """The same row with what JSON refuses replaced; a row that defeats even this says so instead of raising."""
    try:
        return finite(fields)
    except Exception as error:
        return {"unwritable": f"{type(error).__name__}: {error}"}
