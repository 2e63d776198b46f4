"""The attempts of a job: a record that grows by a line at each beginning and end, and the decision what comes next.

A job's script calls this file around its tasks. `begin` prints how many seconds the attempt may take; `end` reads how
the tasks ended, tells the story on its error output (the job's log), and prints the next step and an exit code:

    seconds=$(python -m shoestring.cluster.node.attempts begin JOB_DIR --attempt 0 --nodes n1,n2) || exit 1
    …
    read -r next code <<<"$(python -m shoestring.cluster.node.attempts end JOB_DIR --attempt 0 --code $?)"

    requeue    saved, or a bad node was found: run again (86: without the nodes in `JOB_DIR/excluded`)
    finished   the run has come to its end
    cancelled  somebody ended the job; it has saved
    exhausted  saved, but the job has used up its hours or its requeues
    failed     a task failed, or was killed and left no exit record

Spent time is counted from `begin` to `end`, waiting in a queue costs nothing. An attempt whose machine died before its
`end` counts until the run last wrote something.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...exits import AGAIN, BAD_NODE, FAILURE, FINISHED
from ...files import replace_file
from . import ranks
from .ranks import RankRecord

FINAL = ("finished", "cancelled", "exhausted", "failed")
LOG = "attempts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt. `next` is the decision at its end; empty while it runs, "lost" if its machine failed on the way."""

    number: int
    started: float
    ended: float | None = None
    nodes: tuple[str, ...] = ()
    engine_id: str = ""
    code: int | None = None
    next: str = ""
    reason: str = ""

    @property
    def seconds(self) -> float:
        return max(0.0, (self.ended if self.ended is not None else time.time()) - self.started)


def history(job_dir: str | Path) -> list[Attempt]:
    """The attempts so far, in order. One that was followed by another without having ended is "lost"."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in _rows(Path(job_dir) / LOG):
        row = rows.setdefault(entry["attempt"], {"number": entry["attempt"]})
        row.update({key: value for key, value in entry.items() if key in Attempt.__dataclass_fields__})
    made = [Attempt(**{**row, "nodes": tuple(row.get("nodes", ()))}) for row in rows.values() if "started" in row]
    made.sort(key=lambda attempt: attempt.number)
    return [closed(job_dir, a) if a.ended is None and a is not made[-1] else a for a in made]


def closed(job_dir: str | Path, attempt: Attempt) -> Attempt:
    """An attempt that is over and has not said so: "lost", ended when it was last seen."""
    fields = {**attempt.__dict__, "ended": last_seen(job_dir, attempt), "next": "lost", "reason": "its machine failed"}
    return Attempt(**fields)


def last_seen(job_dir: str | Path, attempt: Attempt) -> float:
    """Return when the run or a task of this attempt last wrote something, Unix seconds.

    What the run has written since it was next attempted, by this job or another, is not this attempt's.
    """
    jobs = Path(job_dir).parent
    starts = [row.get("started", 0.0) for log in jobs.glob(f"*/{LOG}") for row in _rows(log)]
    until = min((start for start in starts if start > attempt.started), default=float("inf"))
    seen = [attempt.started]
    for place in (*ranks.attempt_dir(job_dir, attempt.number).glob("*.json"), *(jobs.parent / "events").glob("*")):
        with suppress(OSError):
            seen.append(place.stat().st_mtime)
    return max(when for when in seen if when <= until)


def _rows(log: Path) -> Iterator[dict[str, Any]]:
    """What a job's record says, line by line; a torn line is passed over."""
    with suppress(OSError):
        for line in log.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                yield {**row, "attempt": int(row["attempt"])}


def spent_seconds(attempts: Iterable[Attempt]) -> float:
    """Wall-clock seconds that the attempts have had their nodes."""
    return sum(attempt.seconds for attempt in attempts)


def begin(job_dir: Path, number: int, nodes: Sequence[str] = (), engine_id: str = "") -> int:
    """Note that an attempt begins; the seconds it may take. 0: the job has used up its hours, which ends it."""
    facts = job_facts(job_dir)
    before = [a for a in history(job_dir) if a.number != number]
    # one that never ended is over now, and was when it was last seen
    before = [closed(job_dir, a) if a.ended is None else a for a in before]
    left = facts["hours"] * 3600 - spent_seconds(before)
    allowed = int(min(left, facts["attempt_hours"] * 3600))
    started = time.time()
    if allowed <= facts["lead_seconds"]:
        reason = f"the job's {facts['hours']:g} h are used up"
        _append(job_dir, attempt=number, started=started, ended=started, next="exhausted", reason=reason)
        forget_secrets(job_dir)
        return 0
    _append(job_dir, attempt=number, started=started, nodes=list(nodes), engine_id=engine_id)
    return allowed


def note(job_dir: Path, number: int, **row: Any) -> None:
    """Say more about an attempt that has begun."""
    _append(job_dir, attempt=number, **row)


def end(job_dir: Path, number: int, code: int, *, cancelled: bool = False, warned: bool = False,
        lost: Sequence[str] = (), pool: Sequence[str] = (), again: bool = False) -> tuple[str, int]:  # fmt: skip
    """Note that an attempt has ended and decide what comes next: (next, exit code).

    `code` is what the engine's own launcher returned; the tasks' records say more and come first. `cancelled`:
    somebody has ended the job. `warned`: its time was up. `lost`: nodes that no longer answer. `pool`: all the nodes
    there are, where the engine has no others to give. `again`: the engine has taken the nodes away and runs the job
    again by itself, so tasks that were killed are no failure.
    """
    facts, records = job_facts(job_dir), ranks.read(job_dir, number)
    verdict, reason = _verdict(records, facts["nodes"] * facts["devices_per_node"], code, lost)
    if cancelled and not records:
        verdict, reason = AGAIN, "the job was cancelled before any task started"
    elif verdict == AGAIN:
        reason = "the job was cancelled" if cancelled else "its time was up" if warned else reason
    after = "requeue" if again and verdict != FINISHED else _next(verdict, cancelled)
    if verdict == BAD_NODE and after == "requeue":
        exclude(job_dir, [*bad_nodes(job_dir, number), *lost])
    if after == "requeue":
        before = [a for a in history(job_dir) if a.number != number]
        this = next((a.seconds for a in history(job_dir) if a.number == number), 0.0)
        left = facts["hours"] * 3600 - spent_seconds(before) - this
        nodes = [node for node in pool if node not in excluded(job_dir)]
        if pool and len(nodes) < facts["nodes"]:
            after, reason = "failed", f"{reason}; {len(nodes)} of {len(pool)} nodes left, {facts['nodes']} needed"
        elif number >= facts["requeues"]:
            after, reason = "exhausted", f"{reason}; {facts['requeues']} requeues are used up (limits.requeues)"
        elif left <= 2 * facts["lead_seconds"]:
            after, reason = "exhausted", f"{reason}; the job's {facts['hours']:g} h are used up"
    _append(job_dir, attempt=number, ended=time.time(), code=verdict, next=after, reason=reason)
    if after in FINAL:
        forget_secrets(job_dir)
    for line in _story(records, verdict, number, after, reason):
        print(line, file=sys.stderr, flush=True)
    return after, verdict


def withdrawn(job_dir: str | Path) -> None:
    """Note that a job was cancelled while it waited, for its first attempt or for another."""
    done, now = history(job_dir), time.time()
    last = done[-1] if done else Attempt(number=0, started=now, ended=now)
    ended = last.ended if last.ended is not None else last_seen(job_dir, last)
    reason = "the job was cancelled while it waited"
    _append(Path(job_dir), attempt=last.number, started=last.started, ended=ended, next="cancelled", reason=reason)
    forget_secrets(job_dir)


def _verdict(records: Sequence[RankRecord], tasks: int, code: int, lost: Sequence[str]) -> tuple[int, str]:
    codes = {record.code for record in records}
    if BAD_NODE in codes:
        return BAD_NODE, "a node has failed its checks"
    if lost:  # before what the others met with: they failed because somebody was gone
        return BAD_NODE, f"lost {', '.join(lost)}"
    if not records and code == AGAIN:
        return AGAIN, "stopped on request before any task started"
    wrong = [r for r in records if r.code not in (None, FINISHED, AGAIN)]
    if wrong:
        first = min(wrong, key=lambda record: record.ended or 0.0)
        assert first.code is not None
        return first.code if 0 < first.code < 128 else FAILURE, f"rank {first.rank} on {first.host}: {first.error}"
    silent = [r for r in records if r.code is None]
    if len(records) == tasks and not silent:
        if AGAIN in codes:
            return AGAIN, "stopped on request; saved"
        return FINISHED, "the run is finished"
    if records and not silent and code in (FINISHED, AGAIN) and codes == {code}:
        return code, "the run is finished" if code == FINISHED else "stopped on request; saved"
    if silent:
        who = ", ".join(f"{r.rank} on {r.host}" for r in silent[:4]) + (" and others" if len(silent) > 4 else "")
        return (
            FAILURE,
            f"rank {who} left no exit record (out of memory, or out of time before it had saved?)",
        )
    return FAILURE, f"{len(records)} of {tasks} tasks started; the launcher returned exit code {code}"


def _next(verdict: int, cancelled: bool) -> str:
    if verdict == FINISHED:
        return "finished"
    if cancelled:
        return "cancelled"
    return "requeue" if verdict in (AGAIN, BAD_NODE) else "failed"


def _story(records: Sequence[RankRecord], verdict: int, number: int, after: str, reason: str) -> Iterable[str]:
    wrong = sorted(
        (r for r in records if r.code not in (None, FINISHED, AGAIN, BAD_NODE)), key=lambda r: r.ended or 0.0
    )
    for record in wrong[:1]:
        yield f"[shoestring] rank {record.rank} on {record.host} was the first to fail, with exit code {record.code}:"
        yield (record.traceback or record.error).rstrip()
    if len(wrong) > 1:
        others = ", ".join(f"{r.rank} on {r.host}" for r in wrong[1:9])
        yield f"[shoestring] then rank {others}{' and others' if len(wrong) > 9 else ''}"
    yield f"[shoestring] attempt {number}: {reason} ({verdict}); {after}"


def bad_nodes(job_dir: str | Path, number: int) -> list[str]:
    """The nodes that failed the checks of an attempt, by the names the engine knows them by."""
    with suppress(OSError, ValueError):
        outcome = json.loads((ranks.attempt_dir(job_dir, number) / "preflight.json").read_text())
        return [str(node) for node in outcome.get("bad", [])]
    return []


def excluded(job_dir: str | Path) -> list[str]:
    """The nodes that the job no longer uses."""
    with suppress(OSError):
        return (Path(job_dir) / "excluded").read_text().split()
    return []


def exclude(job_dir: Path, nodes: Iterable[str]) -> None:
    """Do not use these nodes again for this job."""
    both = dict.fromkeys([*excluded(job_dir), *nodes])
    replace_file(job_dir / "excluded", "".join(f"{node}\n" for node in both))


def forget_secrets(job_dir: str | Path) -> None:
    """Remove the file of secrets, which nothing will read again."""
    (Path(job_dir) / "secrets.sh").unlink(missing_ok=True)


def job_facts(job_dir: str | Path) -> dict[str, Any]:
    """Return `Job.facts` as they were when the job was submitted."""
    facts: dict[str, Any] = json.loads((Path(job_dir) / "job.json").read_text())
    return facts


def _append(job_dir: Path, **row: Any) -> None:
    with open(os.open(job_dir / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), "w") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shoestring.cluster.node.attempts", description="For a job's script."
    )
    parser.add_argument("what", choices=("begin", "end"))
    parser.add_argument("job_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--nodes", default="", help="comma separated")
    parser.add_argument("--engine-id", default="")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--cancelled", action="store_true")
    parser.add_argument("--warned", action="store_true")
    parser.add_argument("--pool", default="", help="all the nodes there are, comma separated")
    parser.add_argument("--lost", default="", help="nodes that no longer answer, comma separated")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args(arguments)
    if given.what == "begin":
        seconds = begin(given.job_dir, given.attempt, [n for n in given.nodes.split(",") if n], given.engine_id)
        if not seconds:
            print("[shoestring] the job has used up its hours", file=sys.stderr, flush=True)
            return FAILURE
        print(seconds)
        return FINISHED
    lost, pool = ([node for node in names.split(",") if node] for names in (given.lost, given.pool))
    after, code = end(
        given.job_dir, given.attempt, given.code, cancelled=given.cancelled, warned=given.warned, lost=lost,
        pool=pool, again=given.again,
    )  # fmt: skip
    print(after, code)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
