"""Jobs launched with the real command line, and watched from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from shoestring.trainer.ledger import read

WAIT = 600.0  # seconds for anything on a machine that is busy with other things


def wait_for(what: Callable[[], object], why: str, seconds: float = WAIT) -> object:
    """What `what()` returns once that is true."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, why
        time.sleep(0.2)
    return value


class Job:
    """One that has been launched; `shoestring` is the command line that did it."""

    def __init__(self, shoestring: Callable[..., str], launched: dict) -> None:
        self.shoestring, self.launched = shoestring, launched
        self.id, self.run_dir = launched["id"], Path(launched["run_dir"])
        self.folder = self.run_dir / "jobs" / self.id
        self.pid = int(launched["engine_id"].split(":")[1])

    def status(self) -> dict:
        return json.loads(self.shoestring("jobs", self.id, "--json"))

    def log(self) -> str:
        return (self.folder / "output.log").read_text(errors="replace")

    def until(self, *states: str) -> dict:
        """Its status when it has come to one of `states`, and no process of it is left."""

        def reached() -> dict | None:
            status = self.status()
            assert status["state"] in states or not _over(status), f"{status}\n{self.log()[-8000:]}"
            return status if status["state"] in states else None

        status = wait_for(reached, f"{self.id} did not come to be {states}\n{self.log()[-8000:]}")
        wait_for(lambda: not self.processes(), f"{self.processes()} are left", 120)
        return status

    def step(self) -> int:
        """The last one that the journal tells of."""
        rows = read(self.run_dir / "events", rank=0)
        return max((row.fields["step"] for row in rows if row.kind == "step"), default=0)

    def events(self, rank: int | None = None) -> list[dict]:
        """What the journals tell beside steps."""
        return [row.fields for row in read(self.run_dir / "events", rank=rank) if row.kind == "event"]

    def until_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step, f"step {step} was not reached\n{self.log()[-8000:]}")

    def attempts(self) -> int:
        lines = self.folder / "attempts.jsonl"
        return len({json.loads(line)["attempt"] for line in lines.read_text().splitlines()}) if lines.exists() else 0

    def processes(self) -> dict[int, str]:
        """Every process on this machine that belongs to the job, and its command line."""
        mark, processes = str(self.folder).encode(), {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words, around = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            ours = mark in words or b"SHOESTRING_JOB_DIR=" + mark in around
            if ours and state != "Z" and int(place.name) != os.getpid():
                processes[int(place.name)] = words.replace(b"\0", b" ").decode(errors="replace")
        return processes


def _over(status: dict) -> bool:
    return status["state"] in ("finished", "cancelled", "exhausted", "failed")


class Launcher:
    """A folder to launch from, with a cluster file in it."""

    def __init__(self, folder: Path, cluster: str, before: Sequence[str] = (), **environ: str) -> None:
        self.folder, self.before = folder, list(before)
        self.environ = {**os.environ, "SHOESTRING_HOME": str(folder / "home"), **environ}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cluster.yaml").write_text(cluster)

    def __call__(self, *words: object) -> str:
        """The output of `shoestring *words`, which must succeed."""
        command = [*self.before, sys.executable, "-m", "shoestring.trainer.cli", *map(str, words)]
        done = subprocess.run(command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def launch(self, run: str, *words: object) -> Job:
        """A job of the recipe and overrides `words`, whose run is `run`."""
        output = self("launch", *words, "--cluster", "cluster.yaml", "--run-dir", self.folder / run, "--json")
        job = Job(self, json.loads(output))
        LAUNCHED.append(job)
        return job


LAUNCHED: list[Job] = []


def end_all() -> None:
    """Leave no process of any job behind, whatever became of its test."""
    while LAUNCHED:
        for pid in LAUNCHED.pop().processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
