"""What a plan refuses before it chooses anything: what is missing on this machine, a budget of less than a step."""

from __future__ import annotations

from ...callbacks.accounting.budget import Budget
from ...own_code import is_code
from ...problems import Problem
from ...recipes import Recipe, RecipeError
from ...recipes.schema import DataSpec
from ..data.errors import TaskError
from ..data.paths import CARRIED, file_format, find_files, find_images, model_folder, one_format
from .sizes import Size


def check_present(recipe: Recipe) -> None:
    """Refuse a recipe whose data or model is to be on this machine and is not."""
    model = recipe.model
    problems = [problem for key, source, one in _sources(recipe) for problem in _missing(recipe, key, source, one)]
    for key, name in (("model.name", model.name), ("model.tokenizer", model.tokenizer)):
        try:
            if isinstance(name, str) and not name.startswith("runs/"):  # which another run is yet to leave there
                model_folder(name, key)
        except TaskError as error:
            problems.append(recipe.problem(key, name, "a folder on this machine, or a hub name", str(error)))
    if problems:
        raise RecipeError(problems)


def _sources(recipe: Recipe) -> list[tuple[str, str, DataSpec]]:
    """The key of each source and of the validation data, what it names, and how it is to be read."""
    data = recipe.data
    keys = [f"data.sources[{number}].source" for number in range(len(data.sources))] or ["data.source"]
    named = [(key, str(one.source), one) for key, (_, one) in zip(keys, data.each(), strict=True)]
    return named + ([("data.validation", data.validation, data)] if isinstance(data.validation, str) else [])


def _missing(recipe: Recipe, key: str, source: str, data: DataSpec) -> list[Problem]:
    """What keeps a source from being read, if it is to be on this machine."""
    if source in CARRIED or is_code(source) or data.format in ("builtin", "hub"):
        return []
    try:
        if recipe.model.task == "image-classification":
            find_images(source, key=key)
            return []
        kind = file_format(data.format)
        files = find_files(source, kind, key=key)
        if files and kind is None:
            one_format(files, source)
    except TaskError as error:
        return [recipe.problem(key, source, "files on this machine", str(error))]
    return []


def check_budget(recipe: Recipe, budget: Budget, size: Size) -> None:
    """Refuse a budget that ends before the first step."""
    per_step = {"samples": recipe.data.batch_size}
    if size.tokens:
        per_step["tokens"] = recipe.data.batch_size * recipe.data.sequence_length if recipe.data.pack else 0
    for name, need in per_step.items():
        limit = budget.given().get(name)
        if limit is not None and limit < need:
            rule = f"at least one optimizer step: {need} {name}"
            raise RecipeError([recipe.problem(f"budget.{name}", f"{limit:g}", rule)])
