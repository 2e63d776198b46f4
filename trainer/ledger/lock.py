"""One writer per run: an advisory lock that dies with its process.

Two supervisors that start the same run would both write attempt 3. The lock is a POSIX record lock: the kernel drops
it when the process dies, kill -9 included, and forked loader workers do not inherit it. On a file system without
locks the run goes on unguarded. `filelock` does neither: its flock lives on in forked workers (before version 4), who
waits empties the file that names the holder, and without locks it leaves a marker that outlives its process.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from ... import ShoestringError

PATIENCE = 5.0  # seconds: a predecessor that was just killed may still be leaving

# POSIX locks belong to the process: closing any descriptor of the file would drop them, so there is one per path here.
_held: dict[str, tuple[int, int]] = {}


class RunBusy(ShoestringError):
    """Another process is writing this run."""


def acquire(path: Path, note: str) -> None:
    """Take the lock file `path`, or raise `RunBusy` after `PATIENCE` seconds. Again in one process: counted."""
    key = os.path.realpath(path)
    fd, count = _held.get(key, (-1, 0))
    if not count:
        fd = os.open(key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _take(fd, path)
        os.truncate(fd, 0)
        os.pwrite(fd, note.encode(), 0)
    _held[key] = fd, count + 1


def release(path: Path) -> None:
    """Give back what `acquire` took; the lock is free once every `acquire` of this process is given back."""
    key = os.path.realpath(path)
    fd, count = _held.pop(key, (-1, 0))
    if count > 1:
        _held[key] = fd, count - 1
    elif count:
        os.close(fd)


def is_held(path: Path) -> bool | None:
    """Whether a process on any machine that shares this file system holds the lock; None if that cannot be told."""
    key = os.path.realpath(path)
    if key in _held:
        return True
    try:
        fd = os.open(key, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        return not _try(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


def _take(fd: int, path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    try:
        while not _try(fd):
            if time.monotonic() > deadline:
                holder = os.pread(fd, 200, 0).decode(errors="replace") or "an unknown process"
                os.close(fd)
                raise RunBusy(f"{path.parent} is being written by {holder}. Stop it or choose another run directory.")
            time.sleep(0.1)
    except OSError:
        return  # this file system has no locks (ENOLCK, ENOSYS): go on unguarded


def _try(fd: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
