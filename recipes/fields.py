"""What the schema says about a field: where an error points, what is allowed there, what was probably meant."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..spelling import did_you_mean, nearest
from ..yaml_reader import YamlNode, scalar
from . import tree as trees
from .recipe import Recipe
from .schema import TechniqueSpec
from .tree import Path

OTHER_TOOLS_NAMES = {  # by the names that other tools use
    "learning_rate": "optimizer.lr",
    "max_steps": "budget.steps",
    "max_time": "budget.hours",
    "lora": "model.adapter",
    "callbacks": "techniques",
    "<<": "extends",
}


def resolve(loc: tuple[str | int, ...], tree: YamlNode) -> tuple[Path, type[BaseModel], FieldInfo | None]:
    """The path of an error's location without the labels that pydantic puts between, its section and its field."""
    path: Path = ()
    section: type[BaseModel] = Recipe
    field: FieldInfo | None = None
    inner: type[BaseModel] | None = Recipe
    for position, part in enumerate(loc):
        if isinstance(part, int):
            exists = trees.find(tree, (*path, part)) is not None
            if exists and inner not in (None, TechniqueSpec):  # a list of sections
                path = (*path, part)
                continue
            return ((*path, part) if exists else path), section, field
        if inner is not None and part in inner.model_fields:
            path, section, field = (*path, part), inner, inner.model_fields[part]
            inner = section_of(field.annotation)
        elif inner is not None and position == len(loc) - 1 and trees.find(tree, (*path, part)) is not None:
            return (*path, part), inner, None
    return path, section, field


def homes(word: str) -> list[str]:
    """Return where a key of that name, or a similar one, belongs: `lr` and `learning_rate` at `optimizer.lr`."""
    if word in OTHER_TOOLS_NAMES:
        return [OTHER_TOOLS_NAMES[word]]
    keys: dict[str, list[str]] = {}
    for name, field in Recipe.model_fields.items():
        keys.setdefault(name, []).append(name)
        section = section_of(field.annotation)
        for key in section.model_fields if section is not None and name != "techniques" else ():
            keys.setdefault(key, []).append(f"{name}.{key}")
    return keys.get(nearest(word, keys) or "", [])


def section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := section_of(part))), None)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _types(annotation: Any) -> set[Any]:
    return {annotation}.union(*(_types(part) for part in get_args(annotation) if not isinstance(part, str)))


def allowed(field: FieldInfo | None) -> str:
    if field is None:
        return "a mapping with at least the keys model, data and budget"
    if field.description:
        return field.description
    section = section_of(field.annotation)
    if section is not None:
        return f"a mapping with the keys {', '.join(section.model_fields)}"
    return " | ".join(_choices(field.annotation))


def hint(node: YamlNode | None, field: FieldInfo | None) -> str:
    """The way out, as far as the value shows what was meant."""
    if node is None or field is None:
        return ""
    types = _types(field.annotation)
    numeric = bool({int, float} & types)
    if node.value is None and not node.text:
        return "write its keys beneath, or remove the line" if section_of(field.annotation) else ""
    if isinstance(node.value, bool) and numeric:
        return "true and false are not numbers"
    if isinstance(node.value, float) and int in types and node.value.is_integer():
        return f"write {int(node.value)}"
    if isinstance(node.value, str):
        return _hint_for_text(node, field, numeric)
    return ""


def _hint_for_text(node: YamlNode, field: FieldInfo, numeric: bool) -> str:
    if numeric and node.text != node.value and _is_number(node.value):
        return f"a number needs no quotes: {node.value}"
    if bool in _types(field.annotation) and node.value.lower() in ("yes", "on", "no", "off"):
        return f"write {'true' if node.value.lower() in ('yes', 'on') else 'false'}"
    return did_you_mean(node.value, _choices(field.annotation))


def _is_number(text: str) -> bool:
    try:
        return isinstance(scalar(text), int | float) and not isinstance(scalar(text), bool)
    except ValueError:
        return False
