"""Every technique by name, in reading order. Adding one is a file, a line in `__init__.pyi` and a behaviour test."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .. import ShoestringError
from ..own_code import import_code, is_code
from ..spelling import nearest
from .contract import Technique

PERSPECTIVES = ("data", "model", "optimization", "system", "sparsity", "compression")


def _lines() -> dict[str, str]:
    """Public name -> its module, in the order of `__init__.pyi`. No class is loaded: they need torch."""
    stub = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8"))
    return {
        alias.name: line.module
        for line in stub.body
        if isinstance(line, ast.ImportFrom) and line.module
        for alias in line.names
    }


HOMES = _lines()
# name -> where its class lives; imported on first use
TECHNIQUES: dict[str, str] = {
    home.rpartition(".")[2]: f"{home}:{name}" for name, home in HOMES.items() if home.partition(".")[0] in PERSPECTIVES
}


class UnknownTechnique(ShoestringError):
    """No technique of this name, or (with `of`) no setting of this name of that technique."""

    def __init__(self, found: str, legal: list[str], of: str | None = None) -> None:
        self.found, self.legal, self.of = found, legal, of
        near = nearest(found, legal)
        self.hint = f"did you mean {near!r}?" if near else ""
        said = f"{of} has no setting {found!r}; it has" if of else f"no technique is called {found!r}; there are"
        super().__init__(f"{said} {', '.join(legal) or 'none'}. {self.hint}".rstrip())


class NotATechnique(ShoestringError):
    """A `module:attr` that is something else."""


@cache
def plugins() -> dict[str, Any]:
    """Techniques of other packages: entry points of the group "shoestring.techniques"."""
    return {point.name: point for point in entry_points(group="shoestring.techniques")}


def names() -> list[str]:
    return [*TECHNIQUES, *(name for name in plugins() if name not in TECHNIQUES)]


def technique_class(name: str) -> type[Technique]:
    """The class of a technique: of a name, or of a user's own `module:attr` (see own_code.py for whose leave it takes).

    Raises `UnknownTechnique`, `CannotImport` or `NotATechnique`.
    """
    if name in TECHNIQUES:
        path, _, attribute = TECHNIQUES[name].partition(":")
        return getattr(import_module(f".{path}", __package__), attribute)
    if name in plugins():
        return plugins()[name].load()
    if is_code(name):
        found = import_code(name)
        if not (isinstance(found, type) and issubclass(found, Technique)):
            raise NotATechnique(f"{name} is {found!r}, not a subclass of shoestring.callbacks.contract.Technique")
        return found
    raise UnknownTechnique(name, names())


def make(name: str, settings: Mapping[str, Any] | None = None) -> Technique:
    """Make a technique by its name in recipes, and check its settings.

    Args:
        name: Of a registered technique, or `module:attr` of the user's own.
        settings: Keyword arguments of its class.

    Returns:
        The technique.

    Raises:
        UnknownTechnique: There is no technique, or no setting, of this name.
        Misconfigured: A setting is outside its range.

    Example:
        >>> make("sequence_length_warmup", {"start": 32})
        SequenceLengthWarmup(start=32, until='30%', multiple=8)
    """
    return make_from(technique_class(name), name, settings)


def make_from(cls: type[Technique], name: str, settings: Mapping[str, Any] | None = None) -> Technique:
    """`make`, of a class that has been found: `name` is what errors call it."""
    legal = cls.setting_names()
    for key in settings or {}:
        if key not in legal:
            raise UnknownTechnique(key, legal, of=name)
    technique = cls(**(settings or {}))
    technique.check()
    return technique
