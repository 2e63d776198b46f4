"""From a cluster file to a `Cluster`, or to one line for each of its mistakes.

cluster = load_cluster("team.yaml")
cluster.engine, cluster.devices_per_node, cluster.usd_per_device_hour
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..spelling import did_you_mean
from ..yaml_reader import is_text
from . import registry
from .config.document import LEAST, ClusterError, Document, Where, read, shown
from .config.hardware import known_hardware
from .config.sections import Cluster

# texts by nature: `012` and `yes` stay what was written
_TEXTS = (("environment", "variables"), ("interconnect", "variables"))


def load_cluster(path: str | Path) -> Cluster:
    """The cluster that the YAML file `path` describes, its engine's own `options` checked too.

    Raises `ClusterError`: for every mistake a line with file, line, key, what was found, what is allowed, and the
    nearest match.
    """
    document = read(Path(path))
    if not isinstance(document.values, dict) or not document.values:
        content = shown(document.values) if document.values else "an empty file"
        raise ClusterError(document.complain((), content, LEAST))
    _keep_spelling(document)
    problems: list[str] = []
    cluster: Cluster | None = None
    try:
        cluster = Cluster.model_validate(document.values)
    except ValidationError as error:
        problems += _problems(document, error, Cluster, ())
    engine = document.values.get("engine")
    if isinstance(engine, str):
        problems += _engine_problems(document, engine)
    if problems or cluster is None:
        raise ClusterError("\n".join(dict.fromkeys(problems)))
    options = registry.engine(cluster.engine).Options.model_validate(cluster.options or {})
    return cluster.model_copy(update={"options": options})


def _keep_spelling(document: Document) -> None:
    for path in _TEXTS:
        values = document.values
        for part in path:
            values = values.get(part) if isinstance(values, dict) else None
        if isinstance(values, dict):
            for name, value in values.items():
                if not isinstance(value, dict | list):
                    values[name] = document.spelled.get((*path, name), value)


def _engine_problems(document: Document, name: str) -> list[str]:
    names = registry.names()
    if name not in names:
        return [document.complain(("engine",), name, " | ".join(names), did_you_mean(name, names))]
    options = registry.engine(name).Options
    given = document.values.get("options")
    try:
        options.model_validate({} if given is None else given)
    except ValidationError as error:
        return _problems(document, error, options, ("options",))
    return []


def _problems(document: Document, error: ValidationError, model: type[BaseModel], above: Where) -> list[str]:
    complaints: dict[Where, str] = {}
    for detail in error.errors(include_url=False):
        spot = _spot(model, detail["loc"], document.values, above)
        if spot.at not in complaints:
            complaints[spot.at] = _complaint(document, dict(detail), spot)
    deepest = [at for at in complaints if not any(other[: len(at)] == at and other != at for other in complaints)]
    return [complaints[at] for at in deepest]


@dataclass(frozen=True)
class Spot:
    """The meaning of pydantic's `loc`: the innermost section and field, the type that is asked for, and the file's path
    (branches of unions left out). `key`: it is a mapping's key that is wrong."""

    section: type[BaseModel]
    field: FieldInfo | None
    kind: Any
    at: Where
    key: bool = False


def _spot(model: type[BaseModel], loc: tuple[Any, ...], values: Any, above: Where) -> Spot:
    for part in above:
        values = values.get(part) if isinstance(values, dict) else None
    section, field, path = model, None, list(above)
    kind: Any = model
    for part in loc:
        inner, element = _held(kind)
        there = isinstance(values, dict) and part in values
        there = there or (isinstance(values, list) and isinstance(part, int) and part < len(values))
        known = inner.model_fields.get(str(part)) if inner is not None else None
        if part == "[key]":
            return Spot(section, field, kind, tuple(path), key=True)
        if inner is not None and (known is not None or there):
            section, field, kind = inner, known, known.annotation if known is not None else None
        elif there:
            kind = element
        else:
            continue
        path.append(part)
        values = values[part] if there else None
    return Spot(section, field, kind, tuple(path))


def _held(kind: Any) -> tuple[type[BaseModel] | None, Any]:
    """The section that a type stands for, also where it may be null; else what its mappings or lists hold."""
    kinds = [kind]
    while kinds:
        kind = kinds.pop()
        origin, inside = get_origin(kind), get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind, None
        if origin is Annotated:
            kinds.append(inside[0])
        elif origin in (Union, UnionType):
            kinds += inside
        elif origin is dict:
            return None, inside[1]
        elif origin in (tuple, list):
            return None, inside[0]
    return None, None


def _complaint(document: Document, detail: dict[str, Any], spot: Spot) -> str:
    if detail["type"] == "extra_forbidden":
        keys = list(spot.section.model_fields)
        return document.complain(spot.at, "an unknown key", _keys(spot.section), did_you_mean(str(spot.at[-1]), keys))
    if spot.key:
        return document.complain(spot.at, str(spot.at[-1]), "names of letters, digits and underscores")
    if detail["type"] == "missing":
        return document.complain(spot.at, "nothing", _rule(spot, detail), "")
    value = document.values
    for part in spot.at:
        value = value[part]
    said = _quoted(document.spelled.get(spot.at), value)
    if spot.at[0] == "secrets" and isinstance(value, str) and _held(spot.kind)[0] is not None:
        said = "a text, which is not repeated here"  # it may be the secret itself
    hint = ""
    if spot.at == ("hardware",):
        hint = did_you_mean(said, [spelling for e in known_hardware().values() for spelling in (e.name, *e.aliases)])
    elif isinstance(value, str):
        hint = did_you_mean(value, _choices(spot.field))
    return document.complain(spot.at, said, _rule(spot, detail), hint)


def _quoted(spelled: str | None, value: Any) -> str:
    """A value as the file has it; in quotes where it would be something else without them."""
    if spelled is None:
        return shown(value)
    if isinstance(value, str) and spelled and not is_text(spelled):
        return f'"{spelled}"'
    return shown(spelled) if spelled else "an empty text"


def _keys(section: type[BaseModel]) -> str:
    return f"the keys {', '.join(section.model_fields)}" if section.model_fields else "no keys at all"


def _rule(spot: Spot, detail: Mapping[str, Any]) -> str:
    inner, _ = _held(spot.kind)
    if inner is not None and detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    element = (
        spot.field is not None and bool(spot.at) and spot.field is not spot.section.model_fields.get(str(spot.at[-1]))
    )
    if spot.field is not None and spot.field.description and not (element and inner is not None):
        return spot.field.description
    choices = _choices(spot.field)
    if choices:
        return " | ".join(choices)
    if inner is not None:
        return f"a mapping with {_keys(inner)}"
    return str(detail["msg"])


def _choices(field: FieldInfo | None) -> list[str]:
    if field is None:
        return []
    return [arg for arg in get_args(field.annotation) if isinstance(arg, str)]
