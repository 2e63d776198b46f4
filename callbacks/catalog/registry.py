"""Every technique by name, in reading order. Adding one is a file, a line in `__init__.pyi` and a behaviour test.

A plan asks techniques for cards, settings, checks and predictions, without torch and without Lightning. A technique's
file imports both at its top, as the file of any Lightning callback does, and uses neither before a run. So a plan
executes it with stand-ins in their place: they can be inherited from, called and subscripted while classes are made,
and raise when anything asks for them later. Such a class has the card, the settings and the rules of the real one,
because the same lines make it; its hooks cannot run, and `ready` gives the technique that can.

The stand-ins are seen by modules of this package alone, and those modules are forgotten afterwards: whoever imports a
technique gets the real one. Techniques of other packages, and a user's own, are always real.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ... import ShoestringError
from ...own_code import import_code, is_code
from ...spelling import nearest
from ..contract import Technique

_CALLBACKS = __name__.rpartition(".catalog.")[0]
PERSPECTIVES = ("data", "model", "optimization", "system", "sparsity", "compression")


def _lines() -> dict[str, str]:
    """Public name -> its module, in the order of `__init__.pyi`. No class is loaded: they need torch."""
    stub = ast.parse(Path(__file__).parents[1].joinpath("__init__.pyi").read_text(encoding="utf-8"))
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
        return getattr(import_module(f".{path}", _CALLBACKS), attribute)
    if name in plugins():
        return plugins()[name].load()
    if is_code(name):
        loaded = import_code(name)
        if not (isinstance(loaded, type) and issubclass(loaded, Technique)):
            raise NotATechnique(f"{name} is {loaded!r}, not a subclass of shoestring.callbacks.contract.Technique")
        return loaded
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


# -- for a plan -------------------------------------------------------------------------------------------------------
ABSENT = ("torch", "pytorch_lightning", "lightning_fabric")
_MODULES = f"{_CALLBACKS}."


class _StandIn:
    """Whatever a module at the top of which torch is imported does with it before the first call of a function."""

    making_classes = False

    def _use(self, *args: Any, **settings: Any) -> _StandIn:
        if not _StandIn.making_classes:
            raise RuntimeError("a plan has no torch and no Lightning; import them in the method that needs them")
        return self

    __call__ = __getitem__ = __or__ = __ror__ = _use

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._use()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules of this package that are imported inside get stand-ins, and are forgotten at the end."""
    stand_in, real, before = _StandIn(), builtins.__import__, set(sys.modules)

    def imported(name: str, scope: Any = None, inside: Any = None, names: Any = (), level: int = 0) -> Any:
        ours = scope is not None and scope.get("__name__", "").startswith(_MODULES)
        if ours and level == 0 and name.partition(".")[0] in ABSENT:
            return stand_in
        return real(name, scope, inside, names, level)

    builtins.__import__ = imported  # type: ignore[assignment]  # which gives no module in one case
    _StandIn.making_classes = True
    try:
        yield
    finally:
        builtins.__import__, _StandIn.making_classes = real, False
        for name in [name for name in sys.modules if name.startswith(_MODULES) and name not in before]:
            folder, _, own = name.rpartition(".")
            if folder in sys.modules:
                vars(sys.modules[folder]).pop(own, None)
            del sys.modules[name]


_declared: dict[str, type[Technique]] = {}


def _declaration(name: str) -> type[Technique]:
    if name not in _declared:
        with _stand_ins():
            _declared[name] = technique_class(name)
    return _declared[name]


def declare(name: str, settings: Mapping[str, Any] | None = None) -> Technique:
    """Make a technique for a plan: cheap where Lightning is not loaded, and then without hooks that can run.

    Args:
        name: As in a recipe.
        settings: Keyword arguments of its class.

    Raises:
        UnknownTechnique: There is no technique, or no setting, of this name.
        Misconfigured: A setting is outside its range.

    Example:
        >>> declare("rigl", {"sparsity": 0.9}).card.name
        'rigl'
    """
    if name not in TECHNIQUES or "pytorch_lightning" in sys.modules:
        return make(name, settings)
    return make_from(_declaration(name), name, settings)


def ready(technique: Technique) -> Technique:
    """The technique that trains: itself, or what its declaration was made from."""
    name = technique.card.name
    return make(name, technique.settings()) if type(technique) is _declared.get(name) else technique
