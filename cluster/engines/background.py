"""A script of a job that runs in the background of this machine, and goes on when the terminal is closed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ..config.document import ClusterError
from ..engine import EngineStatus, JobRecord
from ..job import Job

LOG = "output.log"
POLL = 0.2  # seconds


class InBackground:
    """Base of the engines whose `job.sh` runs here."""

    shares_filesystem = True

    def submit(self, job: Job, files: Mapping[str, str], secrets: Mapping[str, str]) -> str:
        return start(Path(job.job_dir), "job.sh")

    def query_status(self, record: JobRecord) -> EngineStatus:
        return query_status(record)

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        return logs(record, follow)

    def cancel(self, record: JobRecord) -> None:
        cancel(record)


def start(job_dir: Path, script: str) -> str:
    """Run `job_dir/script` in a session of its own, its output in `output.log`; the name by which it is found again:
    `host:pid:start time`, since process ids come back."""
    with open(job_dir / LOG, "ab") as log:
        process = subprocess.Popen(
            ["bash", str(job_dir / script)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "SHOESTRING_PYTHON": sys.executable},  # for the script's own calls
        )  # fmt: skip
    return f"{socket.gethostname()}:{process.pid}:{_started(process.pid)}"


def _started(pid: int) -> str:
    """When a process began, in the kernel's words; empty if there is no such process (or it is only waited for)."""
    try:
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if after[0] in "ZX" else after[19]
    except (OSError, IndexError):
        listed = subprocess.run(["ps", "-o", "lstart=,stat=", "-p", str(pid)], capture_output=True, text=True)
        words = listed.stdout.split()
        return "" if not words or words[-1].startswith("Z") else "-".join(words[:-1])


def _alive(record: JobRecord) -> int | None:
    host, pid, started = record.engine_id.split(":")
    if host != socket.gethostname():
        raise ClusterError(f"{record.id} was launched on {host}: run this command there")
    return int(pid) if started and _started(int(pid)) == started else None


def query_status(record: JobRecord) -> EngineStatus:
    """Running, or gone."""
    if not record.engine_id:
        return EngineStatus("queued")
    pid = _alive(record)
    return EngineStatus("running", detail=f"process {pid}") if pid else EngineStatus("gone")


def cancel(record: JobRecord) -> None:
    """Tell the script that the job is to end."""
    pid = _alive(record)
    if pid is None:
        raise ClusterError(f"{record.id} is not running any more")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def logs(record: JobRecord, follow: bool) -> Iterator[str]:
    """The lines of the job's log, until it is gone."""
    yield from lines(Path(record.job_dir) / LOG, follow, lambda: query_status(record).state == "gone")


def lines(path: Path, follow: bool, over: Callable[[], bool], every: float = POLL) -> Iterator[str]:
    """The lines of a growing file. `follow`: wait for more until `over()`, and then take what is left; look again after
    `every` seconds."""
    while follow and not path.exists() and not over():
        time.sleep(every)
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        rest = ""
        while True:
            last = not follow or over()  # asked before reading, so that nothing written before the end is missed
            rest += file.read()
            *whole, rest = rest.split("\n")
            yield from whole
            if last:
                break
            time.sleep(every)
        if rest:
            yield rest


def streamed(command: list[str]) -> Iterator[str]:
    """The lines that an engine's own command prints, as it prints them; it ends when nobody reads on."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")
    except FileNotFoundError:
        raise ClusterError(
            f"{command[0]} is not installed here: run this on a machine that has this engine's commands"
        ) from None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield line.rstrip("\n")
    finally:
        process.terminate()
        process.stdout.close()
        process.wait()
