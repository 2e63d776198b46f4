"""A rule between fields of a recipe: a function that yields what is broken, and the keys that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .recipe import Recipe


@dataclass(frozen=True)
class Broken:
    """A broken rule at `key`; `found` is None for the value as the user wrote it."""

    key: str
    allowed: str
    hint: str = ""
    found: str | None = None


Check = Callable[[Recipe], Iterator[Broken]]
RULES: list[tuple[tuple[str, ...], Check]] = []


def depends_on(*keys: str) -> Callable[[Check], Check]:
    """Register a rule with the keys that it reads."""

    def register(check: Check) -> Check:
        RULES.append((keys, check))
        return check

    return register
