"""What a task finds around it: modules, virtual environment, variables, and secrets that are never in sight.

Values reach a process through a file of `export` lines that its script sources, never through a command line, where
commas would split them (`srun --export`) and everybody could read them (`ps`).
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from ..exits import BAD_INPUT
from .config.document import ClusterError
from .config.sections import SecretSpec
from .job import Job, secret_sources

HIDDEN = "***"
SECRET_NAMES = "SHOESTRING_SECRETS"  # names, comma separated; their values are taken out of what is written down


def quoted(value: str) -> str:
    """`value` as one word of a POSIX shell, whatever it holds; ClusterError for a NUL, or half a character."""
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ClusterError("a variable holds a NUL or half a surrogate pair, which no process can be given")
    return shlex.quote(value)


def exports(variables: Mapping[str, str]) -> str:
    """`export` lines for a script to source."""
    return "".join(f"export {name}={quoted(value)}\n" for name, value in variables.items())


def variables(job: Job) -> dict[str, str]:
    """The variables of every task: what the cluster file gives, its fabric's, and the names by which tasks know
    their job."""
    cluster = job.cluster
    values = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        **(_gpu_defaults() if job.on_gpus else {}),
        **cluster.interconnect.variables,
        **cluster.environment.variables,
        "SHOESTRING_JOB": job.id,
        "SHOESTRING_JOB_DIR": job.job_dir,
    }
    if job.home:
        values.setdefault("SHOESTRING_HOME", job.home)
    if cluster.interconnect.interface:
        for library in ("NCCL", "GLOO"):
            values.setdefault(f"{library}_SOCKET_IFNAME", cluster.interconnect.interface)
    if cluster.secrets:
        values[SECRET_NAMES] = ",".join(sorted(cluster.secrets))
    return values


def _gpu_defaults() -> dict[str, str]:
    # the flight recorder tells which rank was late in which collective when a job hangs
    return {
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def prologue(job: Job) -> str:
    """Return the first lines of a job's bash scripts: folder, modules, virtual environment, variables, secrets."""
    environment = job.cluster.environment
    lines = [f"cd {quoted(job.workdir)} || exit {BAD_INPUT}"]
    if environment.modules:
        lines += ["module purge", *(f"module load {quoted(name)}" for name in environment.modules)]
    if environment.venv:
        lines.append(f". {quoted(environment.venv.rstrip('/') + '/bin/activate')} || exit {BAD_INPUT}")
    lines.append(f". {quoted(job.job_dir + '/env.sh')} || exit {BAD_INPUT}")
    if job.cluster.secrets:
        lines.append(f". {quoted(job.job_dir + '/secrets.sh')} || exit {BAD_INPUT}")
    return "\n".join(lines) + "\n"


def files(job: Job) -> dict[str, str]:
    """The files of every job on shared storage: the recipe, and the variables to source."""
    return {"recipe.yaml": job.recipe, "env.sh": exports(variables(job))}


def resolve(secrets: Mapping[str, SecretSpec], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The values of secrets, from where they are kept; ClusterError, one line each, for those that are not there."""
    values, problems = {}, []
    for name, spec in secrets.items():
        if spec.env is not None:
            value = environ.get(spec.env)
            if not value:
                problems.append(f"secrets.{name}: the environment variable {spec.env} is not set here")
        else:
            path = Path(str(spec.file)).expanduser()
            try:
                value = path.read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                value = None
                problems.append(f"secrets.{name}: {path} cannot be read ({getattr(error, 'strerror', None) or error})")
            if value == "":
                problems.append(f"secrets.{name}: {path} is empty")
        if value:
            values[name] = value
    if problems:
        raise ClusterError("\n".join(problems))
    return values


def redacted(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without the values of this process's secrets; for whatever is written down on a node."""
    values = {environ.get(name, "") for name in environ.get(SECRET_NAMES, "").split(",") if name} - {""}
    for spelling in sorted({s for value in values for s in _spellings(value)}, key=len, reverse=True):
        text = text.replace(spelling, HIDDEN)  # the longest first: one may hold another
    return text


@lru_cache
def _spellings(value: str) -> tuple[str, ...]:
    """How a secret may stand in a text: as it is, as `repr` and JSON write it, and each of its lines."""
    spellings = {
        value,
        repr(value)[1:-1],
        json.dumps(value)[1:-1],
        *(part for part in value.split("\n") if len(part) > 7),
    }
    return tuple(sorted(filter(None, spellings), key=len, reverse=True))


def redacted_values(value: Any) -> Any:
    """`redacted` for every text in mappings and lists."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: redacted_values(item) for key, item in value.items()}
    return [redacted_values(item) for item in value] if isinstance(value, list | tuple) else value


class TaskStream:
    """A text stream that everything is `redacted` on the way to, and whose reader may go away."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(BrokenPipeError):
            self._stream.write(redacted(text))
        return len(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError):
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def withheld(job: Job) -> str:
    """Return what a dry run shows in place of the file of secrets."""
    return "".join(f"# {name}: from {source}\n" for name, source in secret_sources(job.cluster).items())


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, at no moment otherwise."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def write_files(folder: Path, rendered: Mapping[str, str], executable: Iterable[str] = ()) -> None:
    """Write a job's files into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in rendered.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if name in executable:
            path.chmod(0o755)
