"""From a tree to a `Recipe`, or to everything that is wrong with it, in our own words and with its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from ..problems import Problem
from ..spelling import nearest
from ..yaml_reader import YamlNode, plain
from . import tree as trees
from .errors import RecipeError
from .fields import allowed, hint, homes, resolve
from .recipe import Recipe
from .rule import Broken
from .rules import broken
from .tree import Path, dot, shown

# stands in for required values that are in error, so that the rules between the others can still be checked
STAND_IN = {"name": "x", "model": {"task": "causal-lm"}, "data": {}, "budget": {}}


def validate(tree: YamlNode, problems: Iterable[Problem] = (), allow_code: bool = False) -> Recipe:
    """The recipe that `tree` describes. Raises `RecipeError` with `problems` and all that is wrong beside them."""
    collected = list(problems)
    bad = {path for path, node in trees.walk(tree) if node.flawed}
    values = plain(tree) or {}
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        slips = [slip for slip in _slips(error, tree) if not _within(slip.path, bad)]
        collected += [slip.problem for slip in slips if not slip.explained_by(slips)]
        bad |= {path for slip in slips for path in slip.touched}
        recipe = _healthy(values, bad)
    if recipe is not None:
        collected += _rules(recipe, tree, bad, allow_code)
    if collected or recipe is None:
        raise RecipeError(sorted(collected, key=_order))
    recipe._places = _places(tree, recipe)
    return recipe


@dataclass(frozen=True)
class Slip:
    """One field in error: its path, the path it was probably meant to be (a typo's), and what to say about it."""

    path: Path
    meant: Path
    missing: bool
    problem: Problem

    @property
    def touched(self) -> tuple[Path, Path]:
        return self.path, self.meant

    def explained_by(self, slips: list[Slip]) -> bool:
        """Whether another one says it already: a missing key that is only misspelled, a choice of types inside out."""
        if self.missing:
            return any(slip.meant == self.path for slip in slips if not slip.missing)
        return any(len(slip.path) > len(self.path) and slip.path[: len(self.path)] == self.path for slip in slips)


def _slips(error: ValidationError, tree: YamlNode) -> list[Slip]:
    """One per path: a field that may be of several types gets an error for each of them."""
    by_path: dict[Path, Slip] = {}
    for detail in error.errors(include_url=False):
        slip = _slip(dict(detail), tree)
        by_path.setdefault(slip.path, slip)
    return list(by_path.values())


def _slip(detail: dict[str, Any], tree: YamlNode) -> Slip:
    path, section, field = resolve(detail["loc"], tree)
    if detail["type"] == "extra_forbidden":
        return _unknown(path, section, tree)
    node, context = trees.find(tree, path), detail.get("ctx", {})
    missing = detail["type"] == "missing" and node is None
    rule, way_out = context.get("allowed") or allowed(field), context.get("hint") or hint(node, field)
    key = _technique_key(path, node)
    return Slip(path, path, missing, Problem(trees.where(tree, path), key, shown(node), rule, way_out))


def _unknown(path: Path, section: type[BaseModel], tree: YamlNode) -> Slip:
    word, keys = str(path[-1]), list(section.model_fields)
    if len(path) == 1 and word != "extends":
        keys.append("extends")
    match = nearest(word, keys)
    meant = [match] if match else homes(word)
    way_out = f"did you mean {' or '.join(meant)}?" if meant else ""
    rule = f"the keys {', '.join(keys)}"
    problem = Problem(trees.where(tree, path), dot(path), f"the unknown key {word}", rule, way_out)
    return Slip(path, (*path[:-1], match) if match else path, False, problem)


def _within(path: Path, bad: set[Path]) -> bool:
    return any(path[: len(other)] == other for other in bad)


def _healthy(values: dict[str, Any], bad: set[Path]) -> Recipe | None:
    """The recipe without what is in error, for the rules to look at; None where too little is left."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for path in sorted(bad, key=len, reverse=True):
        _drop(kept, path)
    for key, value in STAND_IN.items():
        kept[key] = {**value, **(kept.get(key) or {})} if isinstance(value, dict) else kept.get(key, value)
    try:
        return Recipe.model_validate(kept)
    except ValidationError:
        return None


def _drop(values: Any, path: Path) -> None:
    """Remove what stands at `path`; of a list the whole list, one item less would be another list."""
    for depth, part in enumerate(path):
        last = depth == len(path) - 1 or isinstance(path[depth + 1], int)
        if not isinstance(values, dict) or part not in values:
            return
        if last:
            del values[part]
            return
        values = values[part]


def _rules(recipe: Recipe, tree: YamlNode, bad: set[Path], allow_code: bool) -> list[Problem]:
    names = {dot(path) for path in bad}

    def in_error(key: str) -> bool:
        return any(_above(key, name) or _above(name, key) for name in names)

    return [_problem(rule, tree) for rule in broken(recipe, allow_code, in_error)]


def _above(one: str, other: str) -> bool:
    return one == other or other.startswith((f"{one}.", f"{one}["))


def _problem(rule: Broken, tree: YamlNode) -> Problem:
    named = {key: node for path, node in trees.walk(tree) for key in (dot(path), _technique_key(path, node))}
    node = named.get(rule.key)
    place = node.where if node else trees.where(tree, tuple(rule.key.split(".")))
    return Problem(place, rule.key, rule.found or shown(node), rule.allowed, rule.hint)


def _technique_key(path: Path, node: YamlNode | None) -> str:
    """A technique goes by its name instead of its number, as in overrides: `techniques.gradual_pruning`."""
    if len(path) == 2 and path[0] == "techniques" and node is not None:
        if isinstance(node.value, str):
            return f"techniques.{node.value}"
        if isinstance(node.value, dict) and len(node.value) == 1:
            return f"techniques.{next(iter(node.value))}"
    return dot(path)


def _places(tree: YamlNode, recipe: Recipe) -> dict[str, str]:
    """Key path -> place, techniques by name."""
    places = {}
    for path, node in trees.walk(tree):
        places[dot(path)] = node.where
        if len(path) >= 3 and path[0] == "techniques":  # ("techniques", 1, name, setting...)
            places[f"techniques.{dot(path[2:])}"] = node.where
        places.setdefault(_technique_key(path, node), node.where)
    return places


def _order(problem: Problem) -> tuple[bool, str, int]:
    """As they stand in the files, overrides last."""
    name, _, line = problem.where.rpartition(":")
    return (False, name, int(line)) if line.isdigit() else (True, problem.where, 0)
