"""Submit a job, and answer for it afterwards: what was written down and what the engine says, put together."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..files import replace_file
from ..spelling import did_you_mean
from . import environment, registry
from .config.document import ClusterError
from .engine import EngineStatus, JobRecord
from .job import Job, refuse_over_cap
from .node import attempts
from .node.attempts import Attempt

StatusName = Literal["submitted", "queued", "running", "requeued", "finished", "cancelled", "exhausted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """The status of a job. `attempts` is its whole history over requeues; `usd` what they have cost so far."""

    state: StatusName
    detail: str = ""
    nodes: tuple[str, ...] = ()
    start: float | None = None
    attempts: tuple[Attempt, ...] = ()
    seconds: float = 0.0
    usd: float | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "cancelled", "exhausted", "failed")


def rendered(job: Job) -> dict[str, str]:
    """Every file of the job; the first one is what the engine is given. No secrets, no torch, nothing asked."""
    files = registry.engine(job.cluster.engine).render(job)
    if not registry.shares_filesystem(job.cluster.engine):
        return files
    return {**files, **{name: text for name, text in environment.files(job).items() if name not in files}}


def dry_run(job: Job) -> str:
    """All that would be submitted, as text that can be read and, file by file, used."""
    parts = rendered(job)
    if job.cluster.secrets and registry.shares_filesystem(job.cluster.engine):
        parts["secrets.sh (mode 600, removed when the job has ended)"] = environment.withheld(job)
    return "\n".join(f"# ---- {name}\n{text.rstrip()}\n" for name, text in parts.items())


def submit(job: Job) -> JobRecord:
    """Check the price, write the job's files beside its run, and hand it to its engine.

    ClusterError, with nothing left behind, if the worst case is above the cap, a secret is missing, or the engine
    refuses.
    """
    refuse_over_cap(job)
    engine = registry.engine(job.cluster.engine)
    secrets = environment.resolve(job.cluster.secrets)
    files, folder = rendered(job), Path(job.job_dir)
    if folder.exists():
        raise ClusterError(f"{folder} exists already: this job has been submitted")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    record = JobRecord(job.id, engine.name, "", job.run_dir, job.job_dir, time.time(), job.facts())
    try:
        environment.write_files(folder, files)
        if secrets and registry.shares_filesystem(engine.name):
            environment.write_private(folder / "secrets.sh", environment.exports(secrets))
        _write(record)
        record = JobRecord(**{**record.__dict__, "engine_id": engine.submit(job, files, secrets)})
        _write(record)
    except BaseException as error:
        shutil.rmtree(made[-1], ignore_errors=True)
        if isinstance(error, OSError):
            raise ClusterError(f"{error.filename or folder}: {error.strerror or error}") from None
        raise
    return record


def status(record: JobRecord) -> Status:
    """Return the status of the job; never "unknown": what was written down answers where the engine cannot."""
    done = tuple(attempts.history(record.job_dir))
    try:
        live = registry.engine(record.engine).query_status(record)
    except ClusterError as error:
        live = (
            EngineStatus("gone", detail=str(error))
            if _closed(done)
            else EngineStatus("queued", detail=f"not answering: {error}")
        )
    state = _state(done, live)
    if state in attempts.FINAL:  # a job that ended before any attempt could say so
        attempts.forget_secrets(record.job_dir)
    if done and done[-1].ended is None and live.state == "gone":
        done = (*done[:-1], attempts.closed(record.job_dir, done[-1]))
    if live.state == "gone":  # also if nothing of the job was left to do it
        with suppress(OSError):
            attempts.forget_secrets(record.job_dir)
    seconds = attempts.spent_seconds(done)
    last = done[-1] if done else None
    return Status(
        state=state, detail=live.detail if not _closed(done) or not last else last.reason,
        nodes=live.nodes or (last.nodes if last else ()), start=live.start, attempts=done, seconds=seconds,
        usd=_usd(record, seconds),
    )  # fmt: skip


def _closed(done: tuple[Attempt, ...]) -> bool:
    return bool(done) and done[-1].next in attempts.FINAL


def _state(done: tuple[Attempt, ...], live: EngineStatus) -> StatusName:
    if _closed(done):
        return done[-1].next  # type: ignore[return-value]
    if live.state == "running":
        return "running"
    if live.state == "queued":
        return "requeued" if done else "queued" if live.detail else "submitted"
    if live.ended:
        return live.ended
    # the engine has nothing to run and nobody has written down an end
    return "failed"


def records(run_dir: str | Path) -> list[JobRecord]:
    """The jobs of one run, oldest first."""
    loaded = []
    for path in Path(run_dir).glob("jobs/*/job.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            loaded.append(load(path.parent))
    return sorted(loaded, key=lambda record: record.submitted)


def load(job_dir: Path) -> JobRecord:
    """The record in `job_dir`."""
    facts = json.loads((job_dir / "job.json").read_text())
    own = facts.pop("record")
    return JobRecord(**{**own, "job_dir": str(job_dir)}, facts=facts)


def spent(run_dir: str | Path) -> float:
    """US dollars that all jobs of a run have cost so far."""
    total = 0.0
    for record in records(run_dir):
        done = attempts.history(record.job_dir)
        # no engine is queried: an attempt whose machine failed silently was over when it was last seen
        done_attempts = [attempts.closed(record.job_dir, each) if each.ended is None else each for each in done]
        total += _usd(record, attempts.spent_seconds(done_attempts)) or 0.0
    return total


def _usd(record: JobRecord, seconds: float) -> float | None:
    """US dollars for all devices of a job; None: no price is known."""
    price = record.facts.get("usd_per_device_hour")
    devices = record.facts["nodes"] * record.facts["devices_per_node"]
    return None if price is None else seconds / 3600 * devices * price


def excluded(run_dir: str | Path) -> tuple[str, ...]:
    """The nodes that jobs of this run have found bad."""
    nodes = [node for record in records(run_dir) for node in attempts.excluded(record.job_dir)]
    return tuple(dict.fromkeys(nodes))


def find(wanted: str, known: list[JobRecord]) -> JobRecord:
    """The job with this id, start of an id, or engine's id; ClusterError with the nearest."""
    for same in (
        [r for r in known if r.id == wanted],
        [r for r in known if r.engine_id == wanted],
        [r for r in known if wanted and r.id.startswith(wanted)],
    ):
        if len(same) > 1:
            raise ClusterError(
                f"{wanted!r} means {len(same)} jobs: {', '.join(r.id for r in same)}. Give more of the id."
            )
        if same:
            return same[0]
    hint = did_you_mean(wanted, [r.id for r in known]) or f"there are {', '.join(r.id for r in known[:8]) or 'none'}"
    raise ClusterError(f"no job {wanted!r}; {hint}")


def logs(record: JobRecord, follow: bool = False) -> Iterator[str]:
    """The job's output, line by line."""
    return registry.engine(record.engine).logs(record, follow)


def cancel(record: JobRecord) -> None:
    """End the job: it saves, and is not run again."""
    registry.engine(record.engine).cancel(record)


def _write(record: JobRecord) -> None:
    own = {key: value for key, value in record.__dict__.items() if key != "facts"}
    replace_file(Path(record.job_dir, "job.json"), json.dumps({**record.facts, "record": own}, indent=1))
