"""What must hold in recipes that learn from preferences; see `rules`."""

from __future__ import annotations

from collections.abc import Iterator

from ..own_code import is_code
from .adapters import CHANGE_BASE
from .preference_schema import LOSSES, PreferenceSpec
from .recipe import Recipe
from .rule import Broken, depends_on

TASKS = ("preference", "reward-model")
# techniques that look into one row of tokens a sample, or into the one call of a model
REFUSED = ("sequence_length_warmup", "distillation", "early_exit")


@depends_on("model.task", "model.preference")
def preference_fits(recipe: Recipe) -> Iterator[Broken]:
    section = recipe.model.preference
    if section is None:
        return
    if recipe.model.task != "preference":
        yield Broken("model.preference", f"null for {recipe.model.task}", "its loss is that of model.task: preference")
        return
    for key in sorted(section.model_fields_set - {"loss", "beta", *section.kind.keys}):
        if getattr(section, key) != PreferenceSpec.model_fields[key].default:
            able = " | ".join(name for name, loss in LOSSES.items() if key in loss.keys)
            hint = f"it has no effect on {section.loss}: remove it"
            yield Broken(f"model.preference.{key}", f"{key} for loss {able}", hint)


@depends_on("model.task", "model.preference", "model.adapter")
def reference_is_there(recipe: Recipe) -> Iterator[Broken]:
    """An adapter whose start changes the base leaves none to measure against."""
    model = recipe.model
    loss = model.preferences
    if model.task != "preference" or model.adapter is None or not loss.kind.reference:
        return
    if model.adapter.start in CHANGE_BASE:
        hint = f"{model.adapter.start} changes the base, which is what {loss.loss} measures against"
        yield Broken("model.adapter.start", "zero | gaussian | orthogonal", hint)


@depends_on("model.task", "data.source", "data.sources")
def preferences_are_read(recipe: Recipe) -> Iterator[Broken]:
    if recipe.model.task not in TASKS:
        return
    if recipe.data.sources:
        yield Broken("data.sources", f"one data.source for {recipe.model.task}", "write the rows into one file")
    elif is_code(recipe.data.source or ""):
        hint = "rows have chosen and rejected, and a prompt"
        yield Broken("data.source", f"a path, a hub name or docstring-preferences for {recipe.model.task}", hint)


@depends_on("model.task", "data.train_on")
def prompts_are_context(recipe: Recipe) -> Iterator[Broken]:
    if recipe.model.task in TASKS and recipe.data.train_on == "all":
        yield Broken("data.train_on", f"answers | last for {recipe.model.task}", "prompts are context alone")


@depends_on("model.task", "techniques")
def techniques_see_pairs(recipe: Recipe) -> Iterator[Broken]:
    for technique in recipe.techniques if recipe.model.task in TASKS else ():
        if technique.name in REFUSED:
            hint = "a sample is two answers, and it looks into one row: remove it"
            yield Broken(f"techniques.{technique.name}", f"no {technique.name} with task {recipe.model.task}", hint)
