"""A cluster file's values with the places they stand at, and its mistakes: place, key, found, allowed, hint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import ShoestringError
from ...problems import Malformed, Problem
from ...yaml_reader import YamlNode, plain, read_text, read_yaml

LEAST = "a mapping with at least name, engine, devices_per_node and hardware"
Where = tuple[str | int, ...]


class ClusterError(ShoestringError):
    """A cluster file, or a job for it, that cannot be used; one line for every mistake."""


@dataclass
class Document:
    """The values of a YAML file, and for every key path its `file:line` and its spelling there."""

    path: Path
    values: Any
    places: dict[Where, str] = field(default_factory=dict)
    spelled: dict[Where, str] = field(default_factory=dict)

    def place(self, key: Where) -> str:
        """`file:line` of `key`, or of what stands nearest above it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, f"{self.path}:1")

    def complain(self, key: Where, value: str, allowed: str, hint: str = "") -> str:
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
        return str(Problem(self.place(key), name, value, allowed, hint))


def read(path: Path) -> Document:
    """The one YAML document in `path`.

    Raises:
        ClusterError: It cannot be read, is too large, or is no YAML that we take (see `yaml_reader.py`).
    """
    try:
        node, problems = read_yaml(read_text(path), lambda line: f"{path}:{line}", what="cluster file", least=LEAST)
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}; allowed: a readable cluster file{_siblings(path)}") from None
    except Malformed as error:
        raise ClusterError(str(error)) from None
    if problems:
        raise ClusterError("\n".join(map(str, problems)))
    document = Document(path, plain(node))
    _note(node, (), document)
    return document


def _note(node: YamlNode, at: Where, document: Document) -> None:
    """Write down where `node` and all below it stand, and how scalars are spelled."""
    document.places[at] = node.where
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            _note(child, (*at, key), document)
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            _note(child, (*at, index), document)
    else:
        document.spelled[at] = node.value if isinstance(node.value, str) else node.text


def _siblings(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return f"; that folder has {', '.join(there[:8])}" if there else ""


def shown(value: Any) -> str:
    """A value as a message repeats it, at most 60 characters of it."""
    text = value if isinstance(value, str) else "nothing" if value is None else repr(value)
    if isinstance(value, Mapping | list):
        text = "a mapping" if isinstance(value, Mapping) else "a list"
    return text if len(text) <= 60 else text[:59] + "…"
