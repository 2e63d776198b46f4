"""Overrides from the command line: `key.path=value`, upon whatever the files say.

    optimizer.lr=1e-3                       one value, read by the same rules as in a file
    optimizer.betas=[0.9, 0.99]             lists and mappings in brackets
    goal=null                               nothing
    name="0.1"                              quotes for text that would be read as something else
    techniques.gradual_pruning.sparsity=0.5 a setting of a technique in the list, by the technique's name
    techniques+=weight_averaging            one more technique; with settings: techniques+={name: {setting: 1}}
    techniques-=weight_averaging            one technique less

They are applied in the order given; a later one sees what an earlier one did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..problems import Problem, clip
from ..spelling import did_you_mean
from ..yaml_reader import YamlNode, collection, scalar
from .errors import RecipeError
from .reader import read_tree
from .tree import put, shown

_OVERRIDE = re.compile(r"(?P<path>[^=\s]+?)(?P<sign>[+-]?)=(?P<value>.*)", re.DOTALL)
FORM = "key.path=value, techniques+=name or techniques-=name"


def override(tree: YamlNode, text: str) -> YamlNode:
    """`tree` with one override applied. Raises `RecipeError` with `override "..."` in the place of file and line."""
    place = f'override "{clip(text)}"'
    match = _OVERRIDE.fullmatch(text.strip())
    if not match or not all(match["path"].split(".")):
        raise RecipeError([Problem(place, "", clip(text) or "nothing", FORM)])
    leaf = _value(match["value"].strip(), place, match["path"])
    if match["sign"]:
        if match["path"] != "techniques":
            raise RecipeError([Problem(place, match["path"], f"{match['sign']}=", FORM)])
        return (_added if match["sign"] == "+" else _removed)(tree, leaf)
    if match["path"].startswith("techniques."):
        return _set_technique(tree, match["path"].removeprefix("techniques."), leaf)
    return put(tree, match["path"].split("."), leaf)


def _value(text: str, place: str, key: str) -> YamlNode:
    """Brackets and quotes are YAML; anything else is one scalar, so that `def f(x):` needs no quotes."""
    if text[:1] in ("[", "{") or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        node, problems = read_tree(text, lambda line: place, key)
        if problems:
            raise RecipeError(problems)
        return node
    try:
        return YamlNode(scalar(text), place, text)
    except ValueError as error:
        raise RecipeError([Problem(place, key, clip(text), str(error))]) from None


def technique_name(item: YamlNode) -> str:
    """The name of an item of the list `techniques`; empty where it has none."""
    if isinstance(item.value, dict) and item.value:
        return next(iter(item.value))
    return item.value if isinstance(item.value, str) else ""


def _items(tree: YamlNode) -> list[YamlNode]:
    held = tree.value.get("techniques")
    return list(held.value) if held and isinstance(held.value, list) else []


def _with_items(tree: YamlNode, items: Sequence[YamlNode], place: str) -> YamlNode:
    return put(tree, ["techniques"], collection(list(items), place))


def _added(tree: YamlNode, leaf: YamlNode) -> YamlNode:
    more = leaf.value if isinstance(leaf.value, list) else [leaf]
    held = tree.value.get("techniques")
    return _with_items(tree, [*_items(tree), *more], held.where if held else leaf.where)


def _removed(tree: YamlNode, leaf: YamlNode) -> YamlNode:
    items = _items(tree)
    name = technique_name(leaf)
    _position(items, name, leaf.where, shown(leaf), "")
    kept = [item for item in items if technique_name(item) != name]
    return _with_items(tree, kept, tree.value["techniques"].where)


def _set_technique(tree: YamlNode, path: str, leaf: YamlNode) -> YamlNode:
    items = _items(tree)
    known = [name for name in map(technique_name, items) if path == name or path.startswith(f"{name}.")]
    name = max(known, key=len, default=path.partition(".")[0])  # names of the user's own code have dots
    position = _position(items, name, leaf.where, name, f"add it with techniques+={name}")
    item = items[position]
    settings = item.value[name] if isinstance(item.value, dict) else collection({}, leaf.where)
    rest = path.removeprefix(name).removeprefix(".")
    items[position] = collection({name: put(settings, rest.split(".") if rest else [], leaf)}, item.where)
    return _with_items(tree, items, tree.value["techniques"].where)


def _position(items: Sequence[YamlNode], name: str, place: str, found: str, otherwise: str) -> int:
    names = [technique_name(item) for item in items]
    if name in names:
        return names.index(name)
    allowed = f"the recipe's techniques: {', '.join(filter(None, names)) or 'none'}"
    raise RecipeError([Problem(place, f"techniques.{name}", found, allowed, did_you_mean(name, names) or otherwise)])
