"""Every technique by name, in reading order. Adding one is a file, a line here and a behaviour test."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from .. import ShoestringError
from .contract import Technique

# name -> where its class lives; imported on first use, because the classes need torch and Lightning
TECHNIQUES: dict[str, str] = {
    # data
    "sequence_length_warmup": "data.sequence_length_warmup:SequenceLengthWarmup",
    "competence_curriculum": "data.competence_curriculum:CompetenceCurriculum",
    # model
    "gradient_checkpointing": "model.gradient_checkpointing:GradientCheckpointing",
    # optimization
    "lr_schedule": "optimization.lr_schedule:LRSchedule",
    "lr_scaling": "optimization.lr_scaling:LRScaling",
    "weight_averaging": "optimization.weight_averaging:WeightAveraging",
    # system
    "mixed_precision": "system.mixed_precision:MixedPrecision",
    # sparsity
    "gradual_pruning": "sparsity.gradual_pruning:GradualPruning",
}


class UnknownTechnique(ShoestringError):
    """No technique of this name, or none of its settings is called that."""


@cache
def plugins() -> dict[str, Any]:
    """Techniques of other packages: entry points of the group "shoestring.techniques"."""
    return {point.name: point for point in entry_points(group="shoestring.techniques")}


def names() -> list[str]:
    return [*TECHNIQUES, *(name for name in plugins() if name not in TECHNIQUES)]


def technique_class(name: str) -> type[Technique]:
    if name in TECHNIQUES:
        path, _, attribute = TECHNIQUES[name].partition(":")
        return getattr(import_module(f".{path}", __package__), attribute)
    if name in plugins():
        return plugins()[name].load()
    near = get_close_matches(name, names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownTechnique(f"no technique is called {name!r}; there are {', '.join(names())}.{hint}")


def make(name: str, settings: Mapping[str, Any] | None = None) -> Technique:
    """The technique `name` with `settings`; `check`ed."""
    import inspect

    cls = technique_class(name)
    legal = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]  # type: ignore[misc]
    for key in settings or {}:
        if key not in legal:
            near = get_close_matches(key, legal, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownTechnique(f"{name} has no setting {key!r}; it has {', '.join(legal) or 'none'}.{hint}")
    technique = cls(**(settings or {}))
    technique.check()
    return technique


def all_cards() -> list[Any]:
    return [technique_class(name).card for name in names()]
