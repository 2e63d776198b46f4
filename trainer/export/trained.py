"""A finished run, found by name and rebuilt: its recipe's model with its final weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import ShoestringError
from ...recipes import Recipe, recipe_from
from ..checkpoint.weights import weights_exist
from ..ledger import Ledger, RunIdentity

if TYPE_CHECKING:
    from torch import nn

    from ..tasks import Task
    from .encodings import Codebook, Grid
    from .trained_rounding import TrainedRounding

WEIGHTS = "final"  # a folder in the run's home, as the next
BEST = "best"  # those of the best evaluation, where the recipe has checkpoint.best
MANIFEST = "shoestring.json"  # in an exported folder: which run it is of, and how it was written
AS_TRAINED = "trained"  # --quantize: the bits that the run's techniques have trained its weights for


class CannotExport(ShoestringError):
    """The trained model cannot be written in the form that was asked for."""


@dataclass(frozen=True)
class Trained:
    """A run's home, its recipe, its task with the final weights in place, and the bits it trained them for, if any."""

    run_dir: Path
    run_id: str
    recipe: Recipe
    task: Task
    rounding: TrainedRounding | None = None
    changed: bool = False  # another model stands in the place of what was trained
    weights: str = WEIGHTS  # the folder in `run_dir` that they are of

    @cached_property
    def model(self) -> nn.Module:
        """The model to export, in evaluation mode: that inside our modules, adapters merged, or the user's module."""
        merged: Any = self.as_run
        if hasattr(merged, "merge_and_unload"):
            from ..tasks.lora import merge_adapter

            if self.rounding is not None and self.rounding.apart:
                merged = copy.deepcopy(merged)  # `as_trained` needs them apart
            merged = merge_adapter(merged)
        return merged.eval()

    @property
    def as_run(self) -> nn.Module:
        """What the run has trained and evaluated, adapters apart; once `model` has been asked for, they are merged."""
        from ..tasks.module import TaskModule

        module: Any = self.task.module
        return module.model if isinstance(module, TaskModule) else module

    @cached_property
    def ways(self) -> Mapping[str, Grid | Codebook]:
        """By the name of a weight of `model`: what it was trained to be. Empty where that is the weight as it is."""
        ways = self.rounding.ways if self.rounding is not None else {}
        return {name: ways[id(p)] for name, p in self.model.named_parameters() if id(p) in ways}

    def with_model(self, model: nn.Module) -> Trained:
        """The same run with another model in the place of its own, which nothing was trained for."""
        other = replace(self, rounding=None, changed=True)
        other.__dict__["model"] = model
        return other

    def as_trained(self) -> Trained:
        """With the model whose weights are in `ways`: adapters that stay in full precision are beside them.

        `CannotExport` where the run has trained for no bits, or its model is no longer what it was trained as.
        """
        if self.rounding is None:
            raise CannotExport(
                f"--quantize {AS_TRAINED}: {self.run_dir} was not trained for low-bit weights: it has neither "
                "quantization_aware nor weight_clustering, or the model has been changed since."
            )
        if not self.rounding.apart:
            return self
        other = replace(self)
        other.__dict__["model"] = self.as_run.eval()
        return other

    @property
    def kind(self) -> str:
        """The recipe's task, such as "causal-lm"."""
        return self.recipe.model.task


def find_run(wanted: str | Path) -> Path:
    """The run directory that a path, an id, the start of an id, or a name in the ledger stands for."""
    if (Path(wanted) / "run.json").exists():
        return Path(wanted)
    if Path(wanted).exists():
        raise CannotExport(f"{wanted} is not a run directory: it has no run.json.")
    folder = Path(Ledger().run(str(wanted)).run_dir)
    if not (folder / "run.json").exists():
        raise CannotExport(f"run {wanted!r} was in {folder}, and which does not exist any more or cannot be reached.")
    return folder


def open_run(wanted: str | Path, *, allow_code: bool = False, best: bool = False) -> Trained:
    """The finished run that `wanted` names. `CannotExport` where it has not finished or has no recipe.

    best: with the weights of its best evaluation, which are there before it has finished.
    """
    run_dir = find_run(wanted)
    identity = RunIdentity.load(run_dir)
    if not identity.recipe:
        raise CannotExport(f"{run_dir} was trained without a recipe, so its model cannot be rebuilt from its records.")
    if best and not weights_exist(run_dir / BEST):
        raise CannotExport(
            f"run {identity.name} in {run_dir} has kept no best weights: there is no {BEST}. "
            "A recipe with checkpoint.best and evaluation.every keeps them."
        )
    if not best and not weights_exist(run_dir / WEIGHTS):
        raise CannotExport(
            f"run {identity.name} in {run_dir} has not finished: there is no {WEIGHTS}. Continue its training first."
        )
    recipe = recipe_from(identity.recipe, identity.name, allow_code)
    return rebuilt(recipe, run_dir, identity.id, weights=BEST if best else WEIGHTS)


def rebuilt(
    recipe: Recipe, run_dir: Path, run_id: str = "", task: Task | None = None, weights: str = WEIGHTS
) -> Trained:
    """The recipe's task with the run's weights, whole and on this host, however they were sharded.

    task: of the same recipe; its data and tokenizer are taken, its module is left alone. weights: their folder.
    """
    from safetensors import SafetensorError

    from ...callbacks.compression.factors import merged_state, ranks_in
    from ..checkpoint import base
    from ..checkpoint.weights import base_of_weights, load_weights, weights_problem
    from ..tasks import build_task
    from .trained_rounding import trained_rounding

    file = run_dir / weights
    outside = base_of_weights(file)
    floats = outside["floats"] if outside is not None else "fp32"  # a frozen base is what it was trained beside
    prepared = task.prepared if task is not None else None
    task = build_task(recipe, workdir=run_dir, precision=floats, prepared=prepared)
    _reshape(task.module, recipe, run_dir)
    again = base.of_module(task.module)
    base.require(outside, again.identity if again is not None else None, file)
    try:
        saved = load_weights(file)
    except SafetensorError as error:
        raise _damaged(run_dir, str(error)) from None
    factored = bool(ranks_in(task.module, saved))
    task.module.float()  # in which it is merged and read
    state = merged_state(task.module, saved)  # others read plain layers
    left_out = again.weights if outside is not None and again is not None else frozenset()
    _load(task.module, state, file, left_out)
    if problem := weights_problem(file):
        raise _damaged(run_dir, problem)
    # what was rounded are the factors, and their product is on no grid
    rounding = None if factored else trained_rounding(task.module, recipe)
    return Trained(run_dir, run_id, recipe, task, rounding, weights=weights)


def _damaged(run_dir: Path, problem: str) -> CannotExport:
    return CannotExport(
        f"the weights in {run_dir} are damaged: {problem}. Train the same recipe into this folder again: it writes "
        "them anew from the newest checkpoint."
    )


def _reshape(module: nn.Module, recipe: Recipe, run_dir: Path) -> None:
    """The shapes that techniques gave the model while it trained, as the newest checkpoint tells them."""
    from ...callbacks.catalog.registry import make
    from ..checkpoint import format as checkpoint

    folder, _ = checkpoint.newest_intact(run_dir / "checkpoints")
    states = checkpoint.read_state(folder / "state.pt")["callbacks"] if folder else {}
    for spec in recipe.techniques:
        technique = make(spec.name, spec.settings)
        if technique.state_key in states:
            technique.rebuild(module, states[technique.state_key])


def manifest_of(folder: Path) -> dict[str, Any]:
    """Read the manifest of an exported folder; empty where no export wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _load(module: nn.Module, weights: dict[str, Any], path: Path, left_out: frozenset[str]) -> None:
    try:
        mismatch = module.load_state_dict(weights, strict=False)  # tied weights are stored once
    except RuntimeError as error:
        raise CannotExport(f"{path} does not fit the model of the recipe: {_second_line(str(error))}") from None
    buffers = {name for name, _ in module.named_buffers()}  # also those that a state dict leaves out
    strange = set(mismatch.unexpected_keys) - buffers
    absent = _absent(module, set(mismatch.missing_keys) - left_out, weights, left_out)
    if strange or absent:
        raise CannotExport(
            f"{path} does not fit the model of the recipe: {_some('lacks', absent)}{_some('has', sorted(strange))}."
        )


def _absent(module: nn.Module, missing: Iterable[str], weights: dict[str, Any], left_out: frozenset[str]) -> list[str]:
    """Missing names but for those that are another name of a weight that is there."""
    aliases = dict(module.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in aliases.items() if name in weights or name in left_out}
    return [name for name in missing if id(aliases.get(name)) not in loaded]


def _some(verb: str, names: list[str]) -> str:
    return f"it {verb} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}; " if names else ""


def _second_line(text: str) -> str:
    lines = text.splitlines()
    return lines[min(1, len(lines) - 1)].strip()
