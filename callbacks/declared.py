"""Techniques as a plan asks them: cards, settings, checks and predictions, without torch and without Lightning.

A technique's file imports both at its top, as the file of any Lightning callback does, and uses neither before a run.
So a plan executes it with stand-ins in their place: they can be inherited from, called and subscripted while classes
are made, and raise when anything asks for them later. Such a class has the card, the settings and the rules of the real
one, because the same lines make it; its hooks cannot run, and `ready` gives the technique that can.

The stand-ins are seen by modules of this package alone, and those modules are forgotten afterwards: whoever imports a
technique gets the real one. Techniques of other packages, and a user's own, are always real.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .contract import Technique
from .registry import TECHNIQUES, make, make_from, technique_class

ABSENT = ("torch", "pytorch_lightning", "lightning_fabric")
_MODULES = f"{__package__}."


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
    """What `registry.make` gives, for a plan: cheap where Lightning is not loaded, and then without hooks that can run.

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
