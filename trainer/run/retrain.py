"""`compress --with RECIPE`: train a finished run's model on, by another recipe's techniques, to be smaller.

The run's own model is where training starts and the teacher of what comes out. Model task, data and evaluation are
those of the run; `techniques`, `optimizer` and `budget` are the recipe's. It becomes a run like any other, in
RUN/compress/<recipe name>: planned, recorded, resumed by the same command.

A Hugging Face model starts from the folder RUN/compress/start-<weights' hash>, adapters merged. Another model starts
from the same weights in memory, and its teacher is "initial": the student as it is before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...recipes import Recipe, recipe_from
from ..checkpoint.weights import weights_digest
from ..export.trained import MANIFEST, WEIGHTS, CannotExport, Trained
from ..export.write import export

OVERLAID = ("techniques", "optimizer", "budget")
BEGAN = "began-with.txt"  # in the new run's directory: the hash of the weights that it started from


def retrained(
    trained: Trained, over: Recipe, *, say: Callable[[str], None] = lambda text: None, display: Any = None,
    allow_code: bool = False,
) -> Path | None:  # fmt: skip
    """Train `trained` by `over` to the end of its budget; the new run's directory on rank 0, None on the others.

    say: hears what is being done. display: of `fit`. A run that is there already goes on, or is taken as it is where it
    has finished. `CannotExport` where the model cannot start another run.
    """
    from ..ledger.report import finished_report
    from ..machine.facts import is_first
    from ..planning.planner import plan
    from .fit import fit

    mark = weights_digest(trained.run_dir / WEIGHTS)[:12]
    start = _start(trained, mark, say)
    recipe = recipe_for(trained, over, start, allow_code)
    home = trained.run_dir.resolve() / "compress" / recipe.name
    _same_start(home, mark, trained)
    if finished_report(home, recipe) is not None:
        say(f"{home} is finished and is used as it is")
        return home
    say(f"training it by {over.name} in {home}")
    made = plan(recipe)
    for warning in made.warnings:
        say(f"warning: {warning}")
    if is_first():
        home.mkdir(parents=True, exist_ok=True)
        (home / BEGAN).write_text(mark)
    weights = None if start is not None else trained.task.module.state_dict()
    report = fit(made, run_dir=home, display=display, weights=weights)
    return None if report is None else home


def recipe_for(trained: Trained, over: Recipe, start: Path | None, allow_code: bool = False) -> Recipe:
    """The run's recipe with `over` laid upon it, from the model in `start`; None: its weights come from memory."""
    values, upper = trained.recipe.model_dump(mode="json"), over.model_dump(mode="json")
    values |= {key: upper[key] for key in OVERLAID} | {"goal": None, "export": None, "name": over.name}
    if start is not None:
        values["model"] |= {"name": str(start), "config": None, "tokenizer": None, "adapter": None}
    for technique in values["techniques"]:
        if "distillation" in technique:
            technique["distillation"]["teacher"] = "initial" if start is None else str(start)
    return recipe_from(values, over.name, allow_code)


def _start(trained: Trained, mark: str, say: Callable[[str], None]) -> Path | None:
    """The folder that a Hugging Face model starts from, written once; None for other models."""
    model: Any = trained.model
    if getattr(getattr(model, "config", None), "structured_cut", None):
        raise CannotExport(
            f"structured_pruning has cut the model of {trained.run_dir}, so no recipe builds a model of its shape. "
            "Compress it without --with, or start from a run that was not cut."
        )
    if not hasattr(model, "save_pretrained"):
        return None
    folder = trained.run_dir.resolve() / "compress" / f"start-{mark}"
    if not (folder / MANIFEST).exists():
        say(f"writing the trained model to {folder}: it is the start of the training, and the teacher")
        export(trained, "hf", out=folder)
    return folder


def _same_start(home: Path, mark: str, trained: Trained) -> None:
    """Refuse to go on from a model that the run has since been trained past."""
    if (home / BEGAN).exists() and (home / BEGAN).read_text() != mark:
        raise CannotExport(
            f"{home} started from other weights than {trained.run_dir} has now: remove it to start again."
        )
