"""What an engine is: the page to read before writing one. The smallest is `engines/local.py`.

An engine turns a `Job` into text, gives the text to what runs it, and afterwards answers for it. Engines drive the
command line of what people already run, so nothing has to be installed for a dry run.

The protocol of a run on every engine: a task exits 0 finished, 85 saved - run me again, 86 this node is bad, anything
else failed. A script of the job begins and ends every attempt with `python -m shoestring.cluster.node.attempts`, which
keeps the record, decides what comes next, and says it in one word on its output.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .config.document import ClusterError
from .config.sections import Section
from .job import Job

State = Literal["queued", "running", "gone"]


@dataclass(frozen=True)
class EngineStatus:
    """The state of a job, from its engine.

    state   "queued": not started, or waiting to start again; "running"; "gone": the engine has nothing (left) to run
    detail  the engine's own word, for people: `PENDING (Priority)`
    nodes   where it runs
    start   when it should start, Unix seconds, where the engine estimates it
    ended   what the engine knows of the end of a job that is gone: finished | failed | cancelled; None: nothing
    """

    state: State
    detail: str = ""
    nodes: tuple[str, ...] = ()
    start: float | None = None
    ended: Literal["finished", "failed", "cancelled"] | None = None


@dataclass(frozen=True)
class JobRecord:
    """A submitted job as it was written down: what `Job.facts` says, and what the engine calls it."""

    id: str
    engine: str
    engine_id: str
    run_dir: str
    job_dir: str
    submitted: float
    facts: Mapping[str, Any]


class Engine(Protocol):
    """One instance serves all jobs; it keeps nothing.

    Attributes:
        name: As cluster files say it.
        Options: The engine's own section of a cluster file.
        shares_filesystem: Whether its nodes see this machine's files. Where they do not, the engine hands over recipe,
            variables and secrets by itself.
    """

    name: str
    Options: type[Section]
    shares_filesystem: bool

    def render(self, job: Job) -> dict[str, str]:
        """Every file of the job by name, without secrets; the first one is what is submitted. Pure: text from a job."""

    def remarks(self, job: Job) -> list[str]:
        """Warnings, and what the engine foresees (a start), where the engine is at hand to ask. Never raises."""

    def submit(self, job: Job, files: Mapping[str, str], secrets: Mapping[str, str]) -> str:
        """Start the job and return the engine's name for it. ClusterError, with nothing left behind, if it refuses."""

    def query_status(self, record: JobRecord) -> EngineStatus:
        """Return the state of a job, from the engine. ClusterError if the engine does not answer."""

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        """The job's output in lines, all attempts; `follow` goes on until the job is gone."""

    def cancel(self, record: JobRecord) -> None:
        """End the job: it saves and is not run again."""


def call(
    command: Sequence[str], *, stdin: str | None = None, timeout: float = 60, environ: Mapping[str, str] | None = None
) -> str:
    """Run an engine's own command and return its output; ClusterError says what it said against it."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, env=environ)
    except FileNotFoundError:
        raise ClusterError(
            f"{command[0]} is not installed here: launch from a machine that has this engine's commands"
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{' '.join(command[:3])} has not answered within {timeout:.0f} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing")[-2000:]
        raise ClusterError(f"{' '.join(command[:3])} failed with exit code {done.returncode}: {said}")
    return done.stdout
