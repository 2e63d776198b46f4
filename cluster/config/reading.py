"""YAML that remembers its lines, and what is wrong with a file, said in one form: place, key, found, allowed, hint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ... import ShoestringError

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000  # aliases counted as often as they are used
Where = tuple[str | int, ...]


class ClusterError(ShoestringError):
    """A cluster file, or a job for it, that cannot be used; one line for every mistake."""


@dataclass
class Document:
    """The values of a YAML file, and for every key path its line and its spelling there."""

    path: Path
    values: Any
    lines: dict[Where, int] = field(default_factory=dict)
    spelled: dict[Where, str] = field(default_factory=dict)
    nodes: int = 0

    def place(self, key: Where) -> str:
        """`file:line` of `key`, or of what stands nearest above it."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}"

    def complain(self, key: Where, found: str, allowed: str, hint: str = "") -> str:
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
        text = f"{self.place(key)}: {name + ': ' if name else ''}found {found}; allowed: {allowed}"
        text += f"; {hint}" if hint else ""
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def read(path: Path) -> Document:
    """The one YAML document in `path`. ClusterError for what cannot be read, broken syntax, keys given twice, tags."""
    try:
        content = path.read_bytes()[: MAX_BYTES + 1]
        if len(content) > MAX_BYTES:
            raise ClusterError(f"{path}:1: found more than {MAX_BYTES // 1024} KiB; allowed: a cluster file")
        node = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}; allowed: a readable cluster file{_sibling(path)}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ClusterError(f"{path}:{line}: found a byte that is not UTF-8; allowed: text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ClusterError(_syntax(path, content.decode("utf-8-sig"), error)) from None
    except RecursionError:
        raise ClusterError(f"{path}:1: found too many brackets in one another; allowed: a cluster file") from None
    document = Document(path, None)
    document.values = _value(node, (), document, set()) if node is not None else {}
    return document


def _syntax(path: Path, content: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error)
    lines = content.splitlines()
    number = min(mark.line if mark else 0, len(lines) - 1)  # an open bracket is noticed behind the last line
    hint = next((hint for sign, hint in _HINTS if sign in said), "")
    return Document(path, None, {(): number + 1}).complain((), shown(lines[number].strip(" ")), f"YAML ({said})", hint)


_HINTS = (
    ("\\t", "indent with spaces, not with tabs"),
    ("another document", "one document a file: remove the line ---"),
    ("mapping values are not allowed", "put quotes around a value that contains a colon"),
)


def _value(node: Any, at: Where, document: Document, above: set[int]) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(at, line)
    document.nodes += 1
    if document.nodes > MAX_NODES:
        raise ClusterError(document.complain(at, f"more than {MAX_NODES} values", "a cluster file"))
    if id(node) in above:
        raise ClusterError(document.complain(at, "an alias inside of what it stands for", "an alias outside of it"))
    above = above | {id(node)}
    if isinstance(node, yaml.ScalarNode):
        document.spelled[at] = node.value
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] in ("binary", "timestamp"):
            return node.value
        try:
            return yaml.SafeLoader("").construct_object(node)
        except yaml.YAMLError:
            raise ClusterError(document.complain(at, f"the tag {node.tag}", "values without a tag")) from None
    if node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        raise ClusterError(document.complain(at, f"the tag {node.tag}", "values without a tag"))
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*at, i), document, above) for i, child in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key, child in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        document.lines[(*at, name)] = key.start_mark.line + 1
        if name in found:
            raise ClusterError(document.complain((*at, name), f"{name} a second time", "each key once"))
        found[name] = _value(child, (*at, name), document, above)
    return found


def _sibling(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return f"; that folder has {', '.join(there[:8])}" if there else ""


def shown(value: Any) -> str:
    """A value as a message repeats it, at most 60 characters of it."""
    text = value if isinstance(value, str) else "nothing" if value is None else repr(value)
    if isinstance(value, Mapping | list):
        text = "a mapping" if isinstance(value, Mapping) else "a list"
    return text if len(text) <= 60 else text[:59] + "…"
