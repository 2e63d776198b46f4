"""Every key of a recipe and of a cluster file, from the pydantic schemas that check them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from shoestring.cluster import registry
from shoestring.cluster.config.sections import Cluster
from shoestring.recipes import Recipe

from .markdown import cell, code, page, table

HEAD = ["key", "type", "default", "allowed"]


def recipe_page() -> str:
    return page(
        "# Recipe keys",
        "A recipe is a YAML file. Every key that may stand in it is here; an unknown key is an error that names "
        "the nearest match. Any key can be changed on the command line: `shoestring train RECIPE optimizer.lr=1e-4`. "
        "`extends: other.yaml` starts from another file.",
        *_sections("", Recipe),
    )


def cluster_page() -> str:
    options = [(name, registry.engine(name).Options) for name in registry.ENGINES]
    return page(
        "# Cluster file keys",
        "A cluster file says where a job runs. It is separate from the recipe, so that any recipe runs on any cluster. "
        "Commented examples for every engine are in `cluster/examples/`.",
        *_sections("", Cluster),
        "## The engines' own options",
        *(part for name, model in options for part in _options(name, model)),
    )


def _options(engine: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"### engine: {engine}"
    rows = _rows("options", model)
    yield table(HEAD, rows) if rows else "This engine has no options."


def _sections(path: str, model: type[BaseModel]) -> Iterator[str]:
    """A heading for every top-level key, in the order of the schema; nested sections become rows of its table."""
    for name, field in model.model_fields.items():
        yield f"(key-{model.__name__.lower()}-{name})=\n\n## {name}"
        section = section_of(field.annotation)
        if section is None or name == "techniques":
            yield table(HEAD, [_row(name, field)])
            continue
        yield _about(section)
        if not field.is_required():
            default = (
                "each key below has its default" if isinstance(field.default, BaseModel) else code(_default(field))
            )
            yield f"If it is left out: {default}."
        yield table(HEAD, _rows(_below(name, field.annotation), section))


def _rows(path: str, model: type[BaseModel]) -> list[list[str]]:
    rows: list[list[str]] = []
    for name, field in model.model_fields.items():
        rows.append(_row(f"{path}.{name}", field))
        if (section := section_of(field.annotation)) is not None:
            rows += _rows(_below(f"{path}.{name}", field.annotation), section)
    return rows


def _below(path: str, annotation: Any) -> str:
    """Where the keys of a section stand: in a mapping of sections below a name, in a list below an item."""
    kinds = type_of(annotation).split(" or ") if section_of(annotation) is not annotation else []
    if "list" in kinds:
        return f"{path}[]"
    return f"{path}.NAME" if any(get_origin(part) is dict for part in (annotation, *get_args(annotation))) else path


def _row(path: str, field: FieldInfo) -> list[str]:
    default = "*must be given*" if field.is_required() else code(_default(field))
    return [code(path), code(type_of(field.annotation)), default, cell(_allowed(field))]


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return "its defaults"
    if default is None or default is PydanticUndefined:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return str(list(default)) if isinstance(default, tuple) else str(default)


def _allowed(field: FieldInfo) -> str:
    if field.description:
        return field.description
    section = section_of(field.annotation)
    if section is not None:
        return "a mapping with the keys of this section"
    choices = literals(field.annotation)
    return " | ".join(choices) if choices else "see the section's text"


def _about(section: type[BaseModel]) -> str:
    return "\n\n".join(cell(block) for block in (inspect.getdoc(section) or "").split("\n\n"))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation such as `AdapterSpec | None`; None for plain values."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := section_of(part))), None)


def literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in literals(part)]


PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}


def type_of(annotation: Any) -> str:
    """A type in the words of a recipe: `number or null`, `list`, `mapping`."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin = get_origin(annotation)
    if origin is Literal:
        return "choice"
    if origin in (tuple, list) or annotation in (tuple, list):
        return "list"
    if origin is dict or annotation is dict or section_of(annotation) is annotation:
        return "mapping"
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated: what it annotates
        return type_of(arguments[0])
    return " or ".join(dict.fromkeys(type_of(part) for part in arguments)) or "text"
