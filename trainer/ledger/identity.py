"""Who a run is: `run.json`, written once, before anything is spent, and read by every later attempt and rank."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ... import ShoestringError, __version__
from ...files import replace_file, write_beside
from .lines import finite

log = logging.getLogger("shoestring.ledger")

_RECORDED = (
    "torch", "pytorch-lightning", "deepspeed", "transformers", "datasets", "peft", "torchao", "accelerate", "wandb",
)  # fmt: skip


class IdentityError(ShoestringError):
    """`run.json` cannot be read or written."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The part of a run that never changes, whatever happens to it later.

    `id` is 12 hex digits; `recipe_hash` the recipe's own hash, `recipe` its full content; `created` wall-clock seconds;
    `git_commit` that of the folder the run was started from, with `+dirty` if it had uncommitted changes.
    """

    id: str
    name: str
    recipe_hash: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0
    git_commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hostname: str = ""

    @classmethod
    def create_or_load(
        cls, run_dir: Path, *, name: str, recipe_hash: str = "", recipe: Mapping[str, Any] | None = None
    ) -> RunIdentity:
        """The identity in `run_dir/run.json`, made now if there is none.

        Any number of ranks may call this at once and all get the same one: the file appears whole, and the first wins.
        An existing identity is returned as it is, so compare its `recipe_hash` with yours before you resume. A damaged
        one is written anew: from the newest checkpoint, which repeats it; as a new one where nothing was saved yet.
        """
        path = Path(run_dir) / "run.json"

        def new(id: str, created: float) -> str:
            made = cls(
                id=id, name=name, recipe_hash=recipe_hash, recipe=recipe or {}, created=created,
                git_commit=_git_commit(), versions=package_versions(), hostname=socket.gethostname(),
            )  # fmt: skip
            return json.dumps(made.as_dict(), indent=1)

        if path.exists():
            _repair(path, new)
        else:
            _publish(path, new(uuid.uuid4().hex[:12], time.time()))
        return cls.load(run_dir)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return finite(asdict(self))  # type: ignore[return-value]

    @classmethod
    def load(cls, run_dir: Path) -> RunIdentity:
        """The identity of an existing run; `IdentityError` if `run_dir` is not a run or its `run.json` is damaged."""
        path = Path(run_dir) / "run.json"
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict) or not isinstance(values.get("recipe", {}), dict):
                raise ValueError("it does not hold what was written")
            return cls(**{key.name: values[key.name] for key in fields(cls) if key.name in values})
        except FileNotFoundError:
            raise IdentityError(f"{run_dir} is not a run directory: it has no run.json.") from None
        except (OSError, ValueError, TypeError) as error:
            raise IdentityError(f"{path} cannot be read ({error}). Restore it or start in another directory.") from None


def write_summary(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Replace `run_dir/summary.json`, in one atomic step, by the totals of the run under the names of `RunRow`.

    Final metrics go in under `metrics`. Raises `OSError` if the disk refuses it.
    """
    replace_file(Path(run_dir) / "summary.json", json.dumps(finite(values), indent=1))


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Read `summary.json`; empty if it is missing or damaged, since the journal has the same."""
    try:
        summary = json.loads((Path(run_dir) / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _repair(path: Path, new: Callable[[str, float], str]) -> None:
    """Write a damaged `run.json` anew; `IdentityError` if there are checkpoints and none of them can be read."""
    from ..checkpoint import format as checkpoint

    with path.open("rb") as file:
        damaged, written = file.read(), os.fstat(file.fileno()).st_mtime_ns
    try:
        RunIdentity.load(path.parent)
        return
    except IdentityError as error:
        root = path.parent / "checkpoints"
        steps = checkpoint.steps(root)
        for step in reversed(steps):
            with suppress(checkpoint.DamagedCheckpoint, KeyError):
                replace_file(path, json.dumps(checkpoint.read_manifest(root / f"{step:09d}")["run"], indent=1))
                log.warning("%s It has been written anew from the checkpoint of step %d.", error, step)
                return
        if steps:
            raise
        # of what lies there, not of chance: ranks that find it damaged at once make the same id
        digest = hashlib.sha256(damaged + written.to_bytes(8, "little")).hexdigest()
        replace_file(path, new(digest[:12], written / 1e9))
        log.warning("%s Nothing was saved under it, so it has been written anew.", error)


def _publish(path: Path, text: str) -> None:
    """Write `text` to `path` unless it exists by now."""
    try:
        temporary = write_beside(path, text)
        try:
            os.link(temporary, path)  # unlike a rename, a link never replaces what another rank has just made
        except FileExistsError:
            pass
        except OSError:
            os.replace(temporary, path)  # a file system without hard links
        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise IdentityError(f"cannot write {path}: {error.strerror}. Choose another run directory.") from None


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def package_versions() -> dict[str, str]:
    """The versions of this package, of Python, and of the packages that decide what a run computes."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"shoestring": __version__, "python": platform.python_version(), "platform": sys.platform}
    for package in _RECORDED:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
