"""From files to a `Recipe`: find, read, lay one upon the other (`extends`, overrides), validate.

    recipe = load_recipe("quickstart.yaml", ["budget.hours=10 min", "seed=1"])
    recipe.optimizer.lr, recipe.hash, recipe.where("optimizer.lr")

`extends: base.yaml` (or a list, later ones win) starts from other files, named relative to the file that says so;
mappings merge key by key, everything else is replaced, and `null` takes a value back. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..problems import Problem, clip
from ..spelling import nearest
from ..yaml_reader import YamlNode, collection
from .check import validate
from .errors import RecipeError
from .overrides import override
from .reader import LEAST, read_recipe_text, read_tree
from .recipe import Recipe
from .tree import graft, merge, shown

MAX_FILES = 64  # that one recipe may extend
SUFFIXES = (".yaml", ".yml", ".json")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package.

    Returns:
        Name -> file, alphabetically.

    Example:
        >>> "quickstart" in shipped_recipes()
        True
    """
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def load_recipe(path: str | Path, overrides: Iterable[str] = (), allow_code: bool = False) -> Recipe:
    """Read a recipe from a file, or the shipped one of that name, and check all of it.

    Args:
        path: A YAML or JSON file, or the name of a shipped recipe.
        overrides: `key.path=value` each, see `overrides.py`.
        allow_code: Let the recipe name code of the user's own (`module:attr`), which is only ever the caller's
            decision.

    Returns:
        The recipe, validated and frozen.

    Raises:
        RecipeError: With every problem there is, each with file and line.

    Example:
        >>> recipe = load_recipe("quickstart", ["budget.hours=10 min", "seed=1"])
        >>> recipe.name, recipe.seed, recipe.budget.steps
        ('quickstart', 1, None)
    """
    files = _Files()
    tree = files.tree(_located(str(path), Path(), str(path), ""))
    problems = list(files.problems)
    for text in overrides:
        try:
            tree = override(tree, text)
        except RecipeError as error:
            problems += error.problems
    return validate(_named(tree, Path(path).stem), problems, allow_code)


def recipe_from(values: Mapping[str, Any], name: str = "recipe", allow_code: bool = False) -> Recipe:
    """Make a recipe of plain values, with the same checks as for a file; `extends` is not followed.

    Args:
        values: As a file would hold them.
        name: What the recipe is called where the values do not say.
        allow_code: Let the values name code of the user's own (`module:attr`).

    Returns:
        The recipe, validated and frozen.

    Raises:
        RecipeError: With every problem there is.

    Example:
        >>> model = {"task": "image-classification", "config": {"kind": "mlp"}}
        >>> recipe = recipe_from({"model": model, "data": {"source": "digits"}, "budget": {"steps": 10}})
        >>> recipe.optimizer.name
        'adamw'
    """
    return validate(_named(graft(dict(values), name), name), (), allow_code)


def _named(tree: YamlNode, stem: str) -> YamlNode:
    """With the file's stem as the name where the recipe gives none; not a key of the user's, so it stands nowhere."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:100] or "recipe"
    if "name" in tree.value:
        return tree
    return collection({"name": YamlNode(name, tree.where, name), **tree.value}, tree.where)


class _Files:
    """The files of one recipe, each read once; `problems` gathers what does not stop the reading."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.done: dict[Path, YamlNode] = {}
        self.open: list[Path] = []  # from the recipe down to the file being read

    def tree(self, path: Path) -> YamlNode:
        home = path.resolve()
        if home not in self.done:
            self.open.append(home)
            self.done[home] = self.extended(path, self.read(path))
            self.open.pop()
        return self.done[home]

    def read(self, path: Path) -> YamlNode:
        node, problems = read_tree(read_recipe_text(path), lambda line: f"{path}:{line}")
        self.problems += problems
        if not isinstance(node.value, dict) and not node.flawed:
            raise self.fatal(node, "", shown(node), LEAST)
        return node if isinstance(node.value, dict) else collection({}, node.where)

    def extended(self, path: Path, node: YamlNode) -> YamlNode:
        """`node` upon all that it extends, in the order written."""
        names = node.value.get("extends")
        tree = collection({key: child for key, child in node.value.items() if key != "extends"}, node.where)
        below: YamlNode | None = None
        for item in self.extends(names):
            base = self.tree(self.base(path, item))
            below = merge(below, base) if below else base
        return merge(below, tree) if below else tree

    def extends(self, names: YamlNode | None) -> list[YamlNode]:
        items = [] if names is None or names.value is None else names.value
        items = items if isinstance(items, list) else [names]
        for item in items:
            if not isinstance(item.value, str) or not item.value:
                raise self.fatal(item, "extends", shown(item), "a file, or a list of files, relative to this one")
        return list(items)

    def base(self, path: Path, item: YamlNode) -> Path:
        base = _located(item.value, path.parent, item.where, "extends")
        if base.resolve() in self.open:
            chain = " -> ".join(file.name for file in [*self.open[self.open.index(base.resolve()) :], base])
            raise self.fatal(item, "extends", f"a circle: {chain}", "files that do not extend each other")
        if len(self.done) + len(self.open) >= MAX_FILES:
            raise self.fatal(item, "extends", f"more than {MAX_FILES} files", f"at most {MAX_FILES}")
        return base

    def fatal(self, node: YamlNode, key: str, found: str, allowed: str) -> RecipeError:
        return RecipeError([*self.problems, Problem(node.where, key, found, allowed)])


def _located(name: str, folder: Path, place: str, key: str) -> Path:
    """The regular file called `name` in `folder`, or the shipped recipe of that name."""
    path = Path(folder, name)
    try:
        if path.is_file():
            short = Path(os.path.normpath(path))  # shows better, but is another file where a link stands before ..
            return short if short.exists() and short.samefile(path) else path
        shipped = shipped_recipes()
        if name in shipped:
            return shipped[name]
        kind = "a directory" if path.is_dir() else "no regular file" if path.exists() else "no such file"
        hint = _siblings(path, shipped)
    except (OSError, ValueError) as error:  # a name that no file can have
        kind, hint = getattr(error, "strerror", None) or str(error), ""
    rule = "a recipe file or the name of a shipped recipe"
    raise RecipeError([Problem(clip(place), key, f"{kind}: {clip(str(path))!r}", rule, hint)])


def _siblings(path: Path, shipped: Mapping[str, Path]) -> str:
    """The hint towards what is there: the likeliest name first, else all that could be meant."""
    folder = path if path.is_dir() else path.parent
    there = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES) if folder.is_dir() else []
    match = nearest(path.name, [*there, *shipped]) or nearest(path.stem, shipped)
    if match and not path.is_dir():
        return f"did you mean {match}?"
    return f"that folder has {clip(', '.join(there))}" if there else f"shipped are {', '.join(shipped)}"
