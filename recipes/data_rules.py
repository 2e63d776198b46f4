"""What must hold within the section `data` of a recipe; see `rules`."""

from __future__ import annotations

from collections.abc import Iterator

from ..own_code import is_code
from ..spelling import did_you_mean, distance
from .recipe import Recipe
from .rule import Broken, depends_on
from .schema import DataSpec

BUILTIN_DATA = {  # source -> the tasks it has what it takes for
    "python-stdlib": ("causal-lm", "masked-lm"),
    "python-packages": ("sequence-classification", "causal-lm", "masked-lm"),
    "python-docstrings": ("causal-lm", "seq2seq"),
    "docstring-preferences": ("preference", "reward-model"),
    "package-descriptions": ("causal-lm", "masked-lm"),
    "digits": ("image-classification",),
}


@depends_on("data.source", "data.sources")
def one_origin_of_data(recipe: Recipe) -> Iterator[Broken]:
    data = recipe.data
    if data.source is None and not data.sources:
        allowed = str(DataSpec.model_fields["source"].description)
        yield Broken("data.source", allowed, found="nothing")
    elif data.source is not None and data.sources:
        yield Broken("data.sources", "exactly one of source and sources", "set source: null to draw from several")


@depends_on("data.text_column", "data.label_column", "data.columns")
def one_name_a_column(recipe: Recipe) -> Iterator[Broken]:
    data = recipe.data
    for name in ("text", "label"):
        key = f"{name}_column"
        if getattr(data.columns, name) is not None and getattr(data, key) != DataSpec.model_fields[key].default:
            yield Broken(f"data.{key}", f"exactly one of {key} and columns.{name}", "keep one")


@depends_on("model.task", "data.source", "data.sources")
def source_fits(recipe: Recipe) -> Iterator[Broken]:
    task = recipe.model.task
    named = [("data.source", recipe.data.source)] if recipe.data.source else []
    named += [(f"data.sources[{number}].source", one.source) for number, one in enumerate(recipe.data.sources)]
    for key, source in named:
        tasks = BUILTIN_DATA.get(source)
        if recipe.data.sources and (source == "digits" or is_code(source)):
            yield Broken(key, "texts: a path | a hub name", "images and code of your own are a data.source, alone")
        elif recipe.data.sources and task == "image-classification":
            yield Broken("data.sources", "one data.source for images", "put the folders of each class into one")
        elif tasks is None:
            close = {name for name in BUILTIN_DATA if distance(source, name) <= len(name) // 4}
            if close:  # taken for a hub name, it would fail after a long search of the network
                hint = f"{did_you_mean(source, close)} (a file of that name is ./{source})"
                yield Broken(key, f"{' | '.join(BUILTIN_DATA)} | a path | a hub name", hint)
        elif not is_code(task) and task not in tasks:
            fitting = "".join(f"{name}, " for name, fit in BUILTIN_DATA.items() if task in fit)
            yield Broken(key, f"for {task}: {fitting}{'or ' if fitting else ''}data of your own")
