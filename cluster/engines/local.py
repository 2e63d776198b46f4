"""This machine: torchrun, in the background, attempt after attempt until the run is finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..engine import Heard, JobRecord
from ..job import Job
from ..reading import ClusterError
from ..sections import Section
from . import background
from .scripts import ATTEMPTS, WAIT, head, torchrun


class LocalOptions(Section):
    """Nothing: this machine has no settings of its own."""


class Local:
    name = "local"
    Options = LocalOptions

    def render(self, job: Job) -> dict[str, str]:
        if job.nodes != 1:
            raise ClusterError(f"{job.nodes} nodes; allowed with engine local: 1. For more machines use engine ssh")
        script = (
            f"{head(job, f'Job {job.id}: {job.devices_per_node} tasks on this machine.')}"
            "child= ending=\n"
            'trap \'[ -n "$child" ] && kill -USR1 "$child"\' USR1           # save, and run again\n'
            'trap \'ending=1; [ -n "$child" ] && kill -TERM "$child"\' TERM INT  # save, and end\n'
            "export SHOESTRING_ATTEMPT\n"
            "for ((SHOESTRING_ATTEMPT = 0; ; SHOESTRING_ATTEMPT++)); do\n"
            f'seconds=$({ATTEMPTS} begin "$JOB" --attempt "$SHOESTRING_ATTEMPT" --nodes "$(hostname)") || exit 1\n'
            f"{torchrun(job, '1', '0', '127.0.0.1', '$((20000 + $$ % 20000))')}"
            f"{WAIT}"
            f'read -r next code < <({ATTEMPTS} end "$JOB" --attempt "$SHOESTRING_ATTEMPT" --code "$code" \\\n'
            '  --nowhere-else ${ending:+--cancelled} $([ "$code" = 124 ] && echo --warned))\n'
            '[ "$next" = requeue ] || exit "$code"\n'
            "done\n"
        )
        return {"job.sh": script}

    def remarks(self, job: Job) -> list[str]:
        return []

    def submit(self, job: Job, files: Mapping[str, str], secrets: Mapping[str, str]) -> str:
        return background.start(Path(job.job_dir), "job.sh")

    def ask(self, record: JobRecord) -> Heard:
        return background.ask(record)

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        return background.logs(record, follow)

    def cancel(self, record: JobRecord) -> None:
        background.cancel(record)
