"""What every task leaves behind about itself: who it was, and how it ended. One small file a rank and attempt."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ...files import replace_file
from ..environment import redacted

# with which code a task ends that has saved, where that is not 85; its record says 85 all the same
SAVED_EXIT = "SHOESTRING_SAVED_EXIT"
LONGEST = 20_000  # characters of a traceback that are kept


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """One task of one attempt. `code` is its exit code, None while it runs or if it was killed.

    started, ended   Unix seconds
    error            the exception in one line, `traceback` all of it; secrets taken out
    """

    rank: int
    node_rank: int
    host: str
    pid: int
    started: float
    ended: float | None = None
    code: int | None = None
    error: str = ""
    traceback: str = ""


def attempt_dir(job_dir: str | Path, attempt: int) -> Path:
    """Return the folder in which the tasks of an attempt leave their records."""
    return Path(job_dir) / "attempts" / str(attempt)


def place(environ: Mapping[str, str] = os.environ) -> tuple[Path, int] | None:
    """(job's folder, attempt) of this process if it is a task of a job, else None."""
    folder = environ.get("SHOESTRING_JOB_DIR")
    if not folder or "RANK" not in environ:
        return None
    return Path(folder), int(environ.get("SHOESTRING_ATTEMPT", 0))


def begun() -> RankRecord:
    """A record of this process, now; from the variables `RANK` and `NODE_RANK` (torchrun: `GROUP_RANK`)."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    rank, host = int(os.environ["RANK"]), socket.gethostname()
    return RankRecord(rank=rank, node_rank=int(node), host=host, pid=os.getpid(), started=time.time())


def ended(record: RankRecord, code: int, error: str = "", traceback: str = "") -> RankRecord:
    """The record, closed. Secrets of this process are taken out of what is said."""
    said = {"error": redacted(error)[:2000], "traceback": redacted(traceback)[-LONGEST:]}
    return RankRecord(**{**asdict(record), "ended": time.time(), "code": code, **said})


def write(job_dir: str | Path, attempt: int, record: RankRecord) -> None:
    """Leave the record, whole or not at all. A disk that refuses it does not end the run."""
    folder = attempt_dir(job_dir, attempt)
    path = folder / f"rank-{record.rank:05d}.json"
    with suppress(OSError):
        replace_file(path, json.dumps(asdict(record)))


def read(job_dir: str | Path, attempt: int) -> list[RankRecord]:
    """The records of an attempt in rank order; half-written ones left out."""
    records = []
    for path in sorted(attempt_dir(job_dir, attempt).glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError):
            row = json.loads(path.read_text())
            records.append(RankRecord(**{f.name: row[f.name] for f in fields(RankRecord) if f.name in row}))
    return sorted(records, key=lambda record: record.rank)
