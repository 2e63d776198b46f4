"""A process that is a task of a job (`cluster/`): it says who it is, hears signals from its first moment on, and leaves
a record of how it ended."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ... import ShoestringError, exits
from ...cluster.environment import TaskStream, redacted
from ...cluster.node import attempts, ranks
from ..machine import signals


@contextmanager
def as_task() -> Iterator[None]:
    """Around everything a task does. Outside of a job it does nothing.

    Python does not get to see how a task ends: it would print secrets that a traceback holds.
    """
    here = ranks.place()
    if here is None:
        yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        exits.die_with_parent()
    sys.stdout, sys.stderr = TaskStream(sys.stdout), TaskStream(sys.stderr)  # type: ignore[assignment]
    job_dir, attempt = here
    record = ranks.begun()

    again = int(os.environ.get(ranks.SAVED_EXIT, exits.AGAIN))

    def leave(name: str) -> None:
        ranks.write(job_dir, attempt, ranks.ended(record, exits.AGAIN, f"stopped by {name}; nothing was to be saved"))
        signals.leave_at_once(name, again)

    try:
        with signals.listening(leave, again):
            ranks.write(job_dir, attempt, record)
            yield
            signals.ignore()
    except BaseException as error:
        code, said = _outcome(error)
        signals.ignore()  # this end is the one to be told
        where = "" if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
        ranks.write(job_dir, attempt, ranks.ended(record, code, said, where))
        if where or isinstance(getattr(error, "code", None), str):
            print(redacted(f"[rank {record.rank} on {record.host}] {where or said}"), file=sys.stderr, flush=True)
        raise SystemExit(again if code == exits.AGAIN else code) from None
    ranks.write(job_dir, attempt, ranks.ended(record, exits.FINISHED))


def preflight() -> list[dict[str, Any]]:
    """Check the nodes together with all other tasks of the job, where its cluster file asks for it (see
    cluster/preflight/check.py): what rank 0 writes down of it. Exits with 86 where a node is bad. Outside of a job it
    does nothing.
    """
    here = ranks.place()
    if here is None:
        return []
    try:
        facts = attempts.job_facts(here[0])
    except OSError:  # not every engine's nodes see what was written where the job was launched
        return []
    if not facts.get("preflight", {}).get("enabled"):
        return []
    from ...cluster.preflight.check import BadNodes, check, this_task

    task = this_task(*here, facts)
    try:
        verdict = check(task)
    except BadNodes as error:
        if task.local_rank == 0:
            print(f"[shoestring] {error}", file=sys.stderr, flush=True)
        raise SystemExit(exits.BAD_NODE) from error
    if task.rank:
        return []
    about = {"window": "preflight", "seconds": verdict.seconds, "bandwidth": verdict.bandwidth, "nodes": task.nodes}
    return [about, *({"window": "preflight", **row} for row in verdict.nodes)]


def _outcome(error: BaseException) -> tuple[int, str]:
    """Exit code and what to say of it in one line."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else exits.FINISHED if error.code is None else exits.FAILURE
        cause = error.__context__ if isinstance(error.__context__, ShoestringError) else None
        return code, str(cause or (error.code if isinstance(error.code, str) else ""))
    return exits.FAILURE, f"{type(error).__name__}: {error}"
