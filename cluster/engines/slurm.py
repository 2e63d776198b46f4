"""Slurm: one task a device under srun, saved and requeued by the job's own script (see slurm_script.py)."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..config.document import ClusterError
from ..config.sections import Count, Section
from ..engine import EngineStatus, JobRecord, call
from ..job import Job, as_time
from ..node import attempts
from . import background
from .slurm_script import job_script, minutes, task_script

# what sbatch reads in a header as it stands: no blanks, quotes or comments
Word = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f\x7f\"'\\#]+$")]
WORD = "null, or one word without blanks, quotes, backslashes and #"
# decided by the job itself
OURS = (
    "job-name|nodes|ntasks[a-z-]*|tasks-per-node|gpus[a-z-]*|gres|cpus-per-task|mem|time|signal|output|error|requeue|"
    "no-requeue|open-mode|array|partition|account|qos|constraint|reservation|parsable|wrap|test-only|export[a-z-]*"
)
Extra = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[^\s\x00-\x1f\x7f\"'\\#]+)?$")]
LOOKS_EVERY = 3.0  # seconds between questions while a log is followed


class SlurmOptions(Section):
    """Options of sbatch besides the job's size and time."""

    partition: Word | None = Field(None, description=WORD)
    account: Word | None = Field(None, description=WORD)
    qos: Word | None = Field(None, description=WORD)
    constraint: Word | None = Field(None, description=WORD)
    reservation: Word | None = Field(None, description=WORD)
    cpus_per_task: Count | None = Field(None, description="null, or a whole number from 1")
    memory_per_node: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = Field(
        None, description='null, or a size as Slurm writes it, like "64G"; 0: all of it'
    )
    gpus: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = Field(
        None, description="null, or this cluster's name for the GPU, like h100"
    )
    extra: Annotated[tuple[Extra, ...], Field(strict=False)] = Field(
        (), description="a list of further sbatch options, each like --exclusive or --mail-user=me@example.org"
    )


class Slurm:
    name = "slurm"
    shares_filesystem = True
    Options = SlurmOptions

    def render(self, job: Job) -> dict[str, str]:
        for option in job.cluster.options.extra:
            if re.fullmatch(rf"--({OURS})(=.*)?", option):
                raise ClusterError(f"options.extra: found {option}; allowed: options that the job does not set itself")
        return {"job.sh": job_script(job), "task.sh": task_script(job)}

    def remarks(self, job: Job) -> list[str]:
        remarks = _paths(job)
        if shutil.which("sbatch") is None:
            return [*remarks, "sbatch is not installed here: the job was not checked with Slurm"]
        for question in (_start, _lead, _partitions):
            with suppress(ClusterError, ValueError):
                remarks += question(self, job)
        return remarks

    def submit(self, job: Job, files: Mapping[str, str], secrets: Mapping[str, str]) -> str:
        said = call(["sbatch", "--parsable", str(Path(job.job_dir, "job.sh"))])
        return said.strip().partition(";")[0]

    def query_status(self, record: JobRecord) -> EngineStatus:
        if not record.engine_id:
            return EngineStatus("queued")
        problems = []
        for source in (_controller, _queue, _accounting):
            try:
                live = source(record)
            except ClusterError as error:
                if "Invalid job id" not in str(error):
                    problems.append(error)
                continue
            if live is not None:
                return live
        if len(problems) == 3:
            raise problems[0]
        return EngineStatus("gone")

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        return background.lines(Path(record.job_dir) / background.LOG, follow, self._over(record))

    def _over(self, record: JobRecord) -> Callable[[], bool]:
        """Whether the job is gone, asked now and then only."""
        checked, gone = float("-inf"), False

        def over() -> bool:
            nonlocal checked, gone
            if not gone and time.monotonic() - checked > LOOKS_EVERY:
                with suppress(ClusterError):  # a controller that does not answer for a while
                    gone = self.query_status(record).state == "gone"
                checked = time.monotonic()
            return gone

        return over

    def cancel(self, record: JobRecord) -> None:
        status = self.query_status(record)
        if status.state == "gone":
            raise ClusterError(f"{record.id} is not running any more")
        if status.state == "running":
            # the script only: it has the tasks save, and takes the time that needs. A plain scancel kills after
            # KillWait; `--full` would reach srun too, which then kills the tasks
            call(["scancel", "--batch", "--signal=TERM", record.engine_id])
        else:
            call(["scancel", record.engine_id])
            attempts.withdrawn(record.job_dir)


# -- what Slurm says of a job ----------------------------------------------------------------------------------------

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ALIVE = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "COMPLETING")


def _status(state: str, reason: str, nodes: str, start: str) -> EngineStatus:
    """A state in Slurm's word as one of ours."""
    detail = state if reason in ("", "None", "0:0") else f"{state} ({reason})"
    names = _hostnames(nodes)
    if state in WAITING:
        return EngineStatus("queued", detail, start=_moment(start))
    if state in ALIVE:
        return EngineStatus("running", detail, names)
    if state == "COMPLETED":
        return EngineStatus("gone", detail, names, ended="finished")
    return EngineStatus("gone", detail, names, ended="cancelled" if state.startswith("CANCELLED") else "failed")


def _controller(record: JobRecord) -> EngineStatus | None:
    fields = _pairs(call(["scontrol", "show", "job", "-o", record.engine_id]))
    state = fields.get("JobState", "")
    if not state:
        return None
    done = attempts.history(record.job_dir)
    if state == "COMPLETING" and done and int(fields.get("Restarts", 0)) > done[-1].number:
        state = "REQUEUED"
    return _status(state, fields.get("Reason", ""), fields.get("NodeList", ""), fields.get("StartTime", ""))


def _queue(record: JobRecord) -> EngineStatus | None:
    rows = call(["squeue", "-h", "-j", record.engine_id, "-o", "%T|%r|%N|%S"]).splitlines()
    return _status(*rows[0].split("|")) if rows else None


def _accounting(record: JobRecord) -> EngineStatus | None:
    rows = call(["sacct", "-n", "-X", "-P", "-j", record.engine_id, "-o", "State,ExitCode,NodeList,Start"]).splitlines()
    return _status(*rows[-1].split("|")) if rows else None


def _pairs(line: str) -> dict[str, str]:
    """`Key=value Key=value` as `scontrol -o` prints it; the first of each key."""
    pairs: dict[str, str] = {}
    for word in line.split():
        key, equals, value = word.partition("=")
        if equals:
            pairs.setdefault(key, value)
    return pairs


def _hostnames(nodes: str) -> tuple[str, ...]:
    """`n[1-2]` as names; as it is where nobody can say."""
    if not nodes or nodes in ("(null)", "None assigned"):
        return ()
    if "[" not in nodes:
        return tuple(nodes.split(","))
    try:
        return tuple(call(["scontrol", "show", "hostnames", nodes]).split())
    except ClusterError:
        return (nodes,)


def _moment(text: str) -> float | None:
    """Unix seconds of a time that Slurm prints, if it is one."""
    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return None


# -- what is worth knowing before a job is submitted ------------------------------------------------------------------


def _paths(job: Job) -> list[str]:
    wanted = {"workdir": job.workdir}
    if job.cluster.environment.venv:
        wanted["environment.venv"] = job.cluster.environment.venv.rstrip("/") + "/bin/activate"
    if job.python.startswith("/") and job.cluster.environment.container is None:
        wanted["the Python of the job"] = job.python
    return [
        f"{what}: {path} does not exist on this machine" for what, path in wanted.items() if not Path(path).exists()
    ]


def _start(slurm: Slurm, job: Job) -> list[str]:
    try:
        said = call(["sh", "-c", "exec sbatch --test-only 2>&1"], stdin=slurm.render(job)["job.sh"])
    except ClusterError as error:
        return [f"Slurm does not accept this job: {str(error).partition(': ')[2] or error}"]
    match = re.search(r"to start at (\S+) .*?nodes (\S+)", said)
    return [f"Slurm expects to start it at {match[1].replace('T', ' ')} on {match[2]}"] if match else []


def _lead(slurm: Slurm, job: Job) -> list[str]:
    match = re.search(r"KillWait\s*=\s*(\d+)", call(["scontrol", "show", "config"]))
    if match is None or int(match[1]) >= job.lead_seconds:
        return []
    return [
        f"saving may take {job.lead_seconds} s, and this cluster kills {match[1]} s after scancel (KillWait): use "
        "`shoestring cancel`, which lets the job save first"
    ]


def _partitions(slurm: Slurm, job: Job) -> list[str]:
    wanted = (job.cluster.options.partition or "").split(",")
    remarks = []
    for fields in map(_pairs, call(["scontrol", "show", "partition", "-o"]).splitlines()):
        name = fields.get("PartitionName", "")
        if name in wanted or (wanted == [""] and fields.get("Default") == "YES"):
            remarks += _partition(name, fields, job)
    return remarks


def _partition(name: str, fields: Mapping[str, Any], job: Job) -> list[str]:
    remarks = []
    most, grace = _seconds(fields.get("MaxTime", "")), int(fields.get("GraceTime", 0))
    if most is not None and most < 60 * minutes(job):
        remarks.append(
            f"partition {name} gives a job at most {as_time(most)} (MaxTime), and an attempt asks for "
            f"{as_time(60 * minutes(job))}: it would never start. Set limits.attempt_hours: {most / 3600:g}"
        )
    if fields.get("PreemptMode", "OFF") not in ("OFF", "GANG") and grace < job.lead_seconds:
        remarks.append(
            f"partition {name} kills {grace} s after a preemption (GraceTime), and saving may take {job.lead_seconds} "
            "s: what was trained since the last checkpoint may be lost. Lower checkpoint.every"
        )
    return remarks


def _seconds(text: str) -> float | None:
    """Of `1-02:03:04`, `02:03:04` or `30:00`; None for UNLIMITED."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return None
    whole = sum(int(part) * 60**power for power, part in enumerate(reversed(parts)))
    return float(whole + 86400 * int(days or 0))
