"""What a run was made from besides its recipe: the data, the tokenizer, the user's code, the packages.

They are written down when a run begins, and compared when it goes on: the same recipe on other text, with other code or
under another torch is another run. The tokenizer itself is kept in the run's folder, and is the one that is used from
then on: weights are trained for it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import ShoestringError
from ...files import replace_file
from ...own_code import import_code, is_code
from ..checkpoint.format import steps
from ..ledger.identity import package_versions

if TYPE_CHECKING:
    from ...recipes import Recipe
    from ..tasks.build import Task

FILE = "inputs.json"
ACCEPT = "Say --accept-changes to go on with what is there now"


class ChangedInputs(ShoestringError):
    """The run directory holds a run that was made from something else."""


def inputs_of(recipe: Recipe, task: Task) -> dict[str, str]:
    """Name -> what it is today, or a digest of it."""
    inputs = {f"version of {name}": version for name, version in package_versions().items()}
    if "data_digest" in task.facts:
        inputs["data"] = task.facts["data_digest"]
    if task.tokenizer is not None:
        inputs["tokenizer"] = task.tokenizer_key
    names = [recipe.model.task, recipe.data.source or "", recipe.optimizer.name, *(t.name for t in recipe.techniques)]
    for name in sorted({name for name in names if is_code(name)}):
        inputs[f"code of {name.partition(':')[0]}"] = _source_digest(import_code(name))
    return inputs


def keep_or_compare(
    run_dir: Path, now: Mapping[str, str], keep: Callable[[Path], None] | None, *, accept: bool, first: bool
) -> list[str]:
    """Write down what a run that begins is made from; for one that goes on, what has changed since.

    Args:
        run_dir: The run's home.
        now: As of `inputs_of`.
        keep: Puts the tokenizer into the home of a run that begins.
        accept: Changes are meant.
        first: This is rank 0, which writes.

    Raises:
        ChangedInputs: Something has changed, and that was not accepted.
    """
    path = run_dir / FILE
    if not steps(run_dir / "checkpoints"):
        if first:
            replace_file(path, json.dumps(now, indent=1))
            if keep is not None:
                keep(run_dir)
        return []
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):  # nothing to compare with: the checkpoints are what counts
        return []
    changed = [
        f"{name} ({_short(before.get(name))} before, {_short(now.get(name))} now)"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed and not accept:
        raise ChangedInputs(
            f"{run_dir} holds a run that was made from something else. It differs in: {', '.join(changed)}. "
            f"{ACCEPT}, or give another run directory."
        )
    return changed


def _source_digest(target: Any) -> str:
    try:
        return hashlib.sha256(Path(inspect.getfile(target)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # made in a shell, or no function or class
        return "unknown"


def _short(value: str | None) -> str:
    return "nothing" if value is None else value[:12]
