"""For engines whose nodes do not see the launching machine's files: the job as nodes know it, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from secrets import token_hex

from ..job import Job
from ..node.attempts import LOG, exclude
from ..node.rendezvous import KEY


def there(job: Job, mounts: Iterable[str]) -> Job:
    """The job with the run's home as its nodes see it: where it is, if that lies below one of the shared `mounts`,
    else under its own name on the first of them."""
    shared = [PurePosixPath(mount) for mount in mounts]
    home = PurePosixPath(job.run_dir)
    if not any(home.is_relative_to(mount) for mount in shared):
        home = shared[0] / home.name
    return replace(job, run_dir=str(home))


def facts_file(job: Job) -> str:
    """`job.json` for the nodes."""
    return json.dumps(job.facts(), indent=1) + "\n"


def node_words(job: Job, files: str) -> list[str]:
    """Return the command of a node without the interpreter, `--node=` and `--master=`, which the engine adds."""
    return ["-m", "shoestring.cluster.node.run", files, f"--nodes={job.nodes}"]


def train_words(job: Job, files: str) -> list[str]:
    """Return the words that follow them."""
    return ["--", *job.train(f"{files}/recipe.yaml")[1:]]


def secret_names(job: Job) -> list[str]:
    """Variables whose values only nodes may see: the user's secrets, and the key by which nodes know each other."""
    return sorted({*job.cluster.secrets, *([KEY] if job.nodes > 1 else [])})


def with_key(job: Job, secrets: Mapping[str, str]) -> dict[str, str]:
    """The values of `secret_names`; the key is a new one."""
    return {**secrets, **({KEY: token_hex(32)} if job.nodes > 1 else {})}


def keep(job_dir: Path, output: str) -> None:
    """Write down here what nodes have said of attempts, in rows of their own record; rows known already stay single."""
    log = job_dir / LOG
    known = set(log.read_text().splitlines()) if log.exists() else set()
    fresh = []
    for line in output.splitlines():
        with suppress(ValueError, TypeError):
            row = json.loads(line)
            if "excluded" in row:
                if row["excluded"]:
                    exclude(job_dir, row["excluded"])
            elif "attempt" in row and line not in known:
                fresh.append(line)
    if fresh:
        with log.open("a") as file:
            file.write("".join(f"{line}\n" for line in fresh))
