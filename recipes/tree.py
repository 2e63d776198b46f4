"""What is done to a tree of nodes: merge two, set one key, look up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..problems import Problem, clip
from ..yaml_reader import YamlNode, collection
from .errors import RecipeError

Path = tuple[str | int, ...]


def merge(base: YamlNode, over: YamlNode) -> YamlNode:
    """`over` upon `base`: mappings merge key by key, anything else (lists too) is replaced as a whole."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return collection(merged, over.where)


def put(tree: YamlNode, path: Sequence[str], leaf: YamlNode) -> YamlNode:
    """`tree` with `leaf` at `path`; mappings on the way are made where there are none."""
    if not path:
        return leaf
    held = tree.value if isinstance(tree.value, dict) else {}
    below = put(held.get(path[0], collection({}, leaf.where)), path[1:], leaf)
    return collection({**held, path[0]: below}, tree.where if held else leaf.where)


def find(tree: YamlNode, path: Path) -> YamlNode | None:
    """The node at `path`, or None."""
    node: YamlNode | None = tree
    for part in path:
        held = node.value if node else None
        if isinstance(part, int) and isinstance(held, list):
            node = held[part] if part < len(held) else None
        else:
            node = held.get(part) if isinstance(held, dict) else None
    return node


def where(tree: YamlNode, path: Path) -> str:
    """Return the place of the node at `path`, or of the nearest one above it."""
    while path and find(tree, path) is None:
        path = path[:-1]
    node = find(tree, path)
    return node.where if node else tree.where


def walk(node: YamlNode, path: Path = ()) -> Iterator[tuple[Path, YamlNode]]:
    """Every node of the tree with its path, parents first."""
    yield path, node
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from walk(child, (*path, key))
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from walk(child, (*path, index))


def graft(value: Any, place: str, path: Path = ()) -> YamlNode:
    """A tree of plain Python values, every node of it standing at `place`.

    Raises `RecipeError` for a value that no file could hold: an object, a number that is none.
    """
    if isinstance(value, dict):
        return collection({str(key): graft(child, place, (*path, str(key))) for key, child in value.items()}, place)
    if isinstance(value, list | tuple):
        return collection([graft(child, place, (*path, index)) for index, child in enumerate(value)], place)
    if (value is not None and type(value) not in (bool, int, float, str)) or value != value:
        rule = "true, false, None, numbers, text, lists and mappings of them"
        raise RecipeError([Problem(place, dot(path), clip(repr(value)), rule)])
    return YamlNode(value, place, repr(value) if isinstance(value, str) else str(value))


def shown(node: YamlNode | None) -> str:
    """The value as a message repeats it: in the user's spelling, on one line, cut to length."""
    if node is None or (node.value is None and not node.text):
        return "nothing"
    if isinstance(node.value, dict):
        return clip("{" + ", ".join(f"{key}: {shown(child)}" for key, child in node.value.items()) + "}")
    if isinstance(node.value, list):
        return clip("[" + ", ".join(shown(child) for child in node.value) + "]")
    return clip(node.text) or '""'


def dot(path: Path) -> str:
    """`("optimizer", "betas", 1)` as `optimizer.betas[1]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
