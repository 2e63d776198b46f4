"""The one exception of this package, and how it suggests the word that was meant."""

from __future__ import annotations

from collections.abc import Iterable

from ... import ShoestringError
from ...spelling import nearest


class TaskError(ShoestringError):
    """A model, its data or its optimizer cannot be built as the recipe says; the message holds the way out."""


def unknown(what: str, name: object, allowed: Iterable[str]) -> TaskError:
    """An error for a name that is not in a closed list: says what was found, what was probably meant, what exists."""
    names = sorted(allowed)
    near = nearest(str(name), names)
    guess = f" Did you mean {near!r}?" if near else ""
    listed = ", ".join(names) if len(names) <= 40 else f"{len(names)} names, such as {', '.join(names[:8])}"
    return TaskError(f"{what}: {name!r} is unknown.{guess} Known: {listed}.")


class BadRow(TaskError):
    """A row that cannot be trained on. reason: why, in the few words that such rows are counted by."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
