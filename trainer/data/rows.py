"""What a row of data is, and its checks: one that cannot be trained on is named with file and row.

Texts stay what they are: no number, date or missing value is guessed from `NA`, `null` or `007`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from ...problems import clip
from .errors import BadRow, TaskError, unknown

PIECE = 1 << 16  # characters
LONGEST = 32 << 20  # characters of a row: more is a file whose rows have not been told apart


@dataclass(frozen=True)
class Columns:
    """The columns to read. label: None where texts are trained on alone. others: of rows that are more than a text.

    named: what `data.columns` calls them: our name -> the file's, in which the others are, too.
    """

    text: str
    label: str | None = None
    others: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def all(self) -> list[str]:
        """Their names."""
        return [self.text, *self.others, *([] if self.label is None else [self.label])]


@dataclass(frozen=True)
class Place:
    """Where a row stands: what its file is called, and its number there from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


# a row before it is checked: its place, and its values by column, or what is wrong with it
Row = tuple[Place, Mapping[str, Any] | BadRow]
# the columns to read of those that a file has
Choose = Callable[[Collection[str]], Columns]


def text_of(place: Place, row: Mapping[str, Any], column: str, key: str = "data.text_column") -> str:
    """The text of a row; raises `BadRow` where there is none. key: the recipe's, for errors."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        has = "" if column in row else f" (it has {', '.join(map(repr, row)) or 'nothing'})"
        raise BadRow(
            f"{key}: {place} has no {column!r}{has}. Take the row out, or give it a text.", f"without {column!r}"
        )
    raise BadRow(
        f"{key} {column!r}: {place} is {kind_of(value)}, found {clip(str(value))}; a text is needed.",
        f"{column!r} is no text",
    )


def too_long(place: Place) -> BadRow:
    """What is wrong with a row of more than `LONGEST` characters."""
    return BadRow(
        f"data.source: {place} has more than {LONGEST:,} characters. Cut it into several rows.", "too long to be a row"
    )


def kind_of(value: object) -> str:
    """What a value is, in the words of a message."""
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        messages = value and isinstance(value[0], Mapping)
        return "a list of messages" if messages else "a list"
    return "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def check_columns(where: str, columns: Columns, present: Collection[str], hint: str = "") -> None:
    """Raise `TaskError` where a column is not among those present, or is there more than once."""
    keys = {theirs: f"columns.{ours}" for ours, theirs in columns.named.items()}
    for name in dict.fromkeys([*keys, *columns.all]):
        if name in present:
            if not isinstance(present, Mapping) and list(present).count(name) > 1:
                raise TaskError(f"data.source: {where}the column {name!r} is there twice. Rename or remove one.")
            continue
        key = "label_column" if name == columns.label else "format" if columns.others else "text_column"
        nested = isinstance(present, Mapping) and next((k for k, v in present.items() if isinstance(v, list)), None)
        if nested and not hint:
            hint = f" If the rows are under {nested!r}, set data.args: {{field: {nested}}}."
        raise TaskError(f"{where}{unknown(f'data.{keys.get(name, key)}', name, present)}{hint}")


def pieces(text: TextIO, size: int = PIECE) -> Iterator[str]:
    """A long text in pieces of at most `size` characters, cut after a line where there is one."""
    held = ""
    while more := text.read(size + 1 - len(held)):
        held += more
        if len(held) <= size:
            continue
        end = held.rfind("\n", 0, size) + 1 or size
        yield held[:end]
        held = held[end:]
    if held:
        yield held


def pieces_of(text: str, size: int = PIECE) -> Iterator[str]:
    """As `pieces`, of a text in memory; an empty one is one piece."""
    return iter([text]) if len(text) <= size else pieces(io.StringIO(text, newline=""), size)
