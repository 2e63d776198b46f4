"""From a cluster file to a `Cluster`, or to one line for each of its mistakes.

cluster = load_cluster("team.yaml")
cluster.engine, cluster.devices_per_node, cluster.usd_per_device_hour
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from . import registry
from .hardware import known_hardware
from .reading import ClusterError, Document, Where, nearest, read, shown
from .sections import Cluster

# texts by nature: `012` and `yes` stay what was written
_TEXTS = (("environment", "variables"), ("interconnect", "variables"))


def load_cluster(path: str | Path) -> Cluster:
    """The cluster that the YAML file `path` describes, its engine's own `options` checked too.

    Raises `ClusterError`: for every mistake a line with file, line, key, what was found, what is allowed, and the
    nearest match.
    """
    document = read(Path(path))
    if not isinstance(document.values, dict):
        raise ClusterError(document.complain((), shown(document.values), "a mapping with at least name and engine"))
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
        return [document.complain(("engine",), name, " | ".join(names), nearest(name, names))]
    options = registry.engine(name).Options
    given = document.values.get("options")
    try:
        options.model_validate({} if given is None else given)
    except ValidationError as error:
        return _problems(document, error, options, ("options",))
    return []


def _problems(document: Document, error: ValidationError, model: type[BaseModel], above: Where) -> list[str]:
    found: dict[Where, str] = {}
    for detail in error.errors(include_url=False):
        section, field, path = _field(model, detail["loc"], document.values, above)
        at = (*above, *path)
        if at not in found:
            found[at] = _complaint(document, dict(detail), section, field, at)
    return list(found.values())


def _field(
    model: type[BaseModel], loc: tuple[Any, ...], values: Any, above: Where
) -> tuple[type[BaseModel], FieldInfo | None, Where]:
    """The section and field that pydantic's `loc` means, and its path as the file has it (union branches left out)."""
    for part in above:
        values = values.get(part) if isinstance(values, dict) else None
    path: list[Any] = []
    section, field = model, None
    for part in loc:
        here = isinstance(values, dict) and part in values
        inner = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if field is None or _section(field) is None:
            known = section.model_fields.get(str(part)) if not path or field is None else None
            if known is None and not (here or inner):
                if not path:
                    return section, None, (part,)
                continue
            field = known or field
        else:
            section = _section(field) or section
            field = section.model_fields.get(str(part))
        path.append(part)
        values = values[part] if here or inner else None
        if field is None:
            break
    return section, field, tuple(path)


def _section(field: FieldInfo | None) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be null, or in a mapping or a list of them."""
    kinds: list[Any] = [field.annotation] if field is not None else []
    while kinds:
        kind = kinds.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        if get_origin(kind) in (Union, UnionType):
            kinds += get_args(kind)
    return None


def _complaint(
    document: Document, detail: dict[str, Any], section: type[BaseModel], field: FieldInfo | None, at: Where
) -> str:
    if detail["type"] == "extra_forbidden":
        keys = list(section.model_fields)
        return document.complain(at, "an unknown key", f"the keys {', '.join(keys)}", nearest(str(at[-1]), keys))
    value = document.values
    for part in at:
        held: Any = part if (isinstance(value, dict) and part in value) or isinstance(value, list) else None
        value = None if held is None else value[held]
    if detail["type"] == "missing":
        return document.complain(at, "nothing", _rule(field, detail), "")
    said = document.spelled.get(at, shown(value))
    hint = ""
    if at == ("hardware",):
        hint = nearest(said, [spelling for e in known_hardware().values() for spelling in (e.name, *e.aliases)])
    elif isinstance(value, str):
        hint = nearest(value, _choices(field))
    return document.complain(at, said if said else "an empty text", _rule(field, detail), hint)


def _rule(field: FieldInfo | None, detail: Mapping[str, Any]) -> str:
    if field is not None and field.description:
        return field.description
    choices = _choices(field)
    if choices:
        return " | ".join(choices)
    section = _section(field)
    if section is not None:
        return f"a mapping with the keys {', '.join(section.model_fields)}"
    return str(detail["msg"])


def _choices(field: FieldInfo | None) -> list[str]:
    if field is None:
        return []
    return [arg for arg in get_args(field.annotation) if isinstance(arg, str)]
