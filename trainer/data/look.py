"""A first look at somebody's data: what its rows are, how many, how long; nothing is tokenized and nothing kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from ...recipes.data_rules import BUILTIN_DATA
from .errors import BadRow, TaskError
from .paths import find_files, one_format
from .readers import read_rows
from .rows import Columns, Row
from .shapes import SHAPES, Shape, shape_of
from .sources import FEW_FILES, TEXTS

ROWS = 2000  # that are read
TEXTS_NAMED = ("text", "content", "body", "sentence", "review", "document")  # columns of texts, likeliest first
LABELS_NAMED = ("label", "labels", "class", "category", "sentiment", "stars")


@dataclass(frozen=True)
class Look:
    """What was seen of a source.

    Attributes:
        kind: chats (with prompts and their completions), texts, labels (texts with a class each), or unknown: a name of
            the hub, which is not asked.
        rows: As many as were read, at most `ROWS`; `all` says whether these are all there are.
        characters: Of a row, at most, for 95 % of them.
        shape: What rows of more than a text are, such as messages.
        text_column: Of the texts.
        label_column: Of the classes.
    """

    kind: Literal["chats", "texts", "labels", "unknown"]
    rows: int = 0
    all: bool = True
    characters: int = 0
    shape: str | None = None
    text_column: str = "text"
    label_column: str | None = None


def look_at(source: str, *, key: str = "data.source") -> Look:
    """What `source` holds: files, a folder, a glob, or what this machine carries.

    Raises `TaskError` where nothing is there, or its rows are not to be recognised. key: what the user calls it.
    """
    if source in TEXTS:
        if "causal-lm" not in BUILTIN_DATA[source]:
            raise TaskError(f"{key}: {source} has preferences. Begin with `shoestring recipes show dpo`.")
        corpus = TEXTS[source](limit=ROWS)
        kind: Any = "chats" if corpus.shaped else "texts"
        return _measured(Look(kind, shape="messages" if corpus.shaped else None), map(len, corpus.texts))
    files = find_files(source, key=key)
    if not files:
        return Look("unknown")
    form, chosen = one_format(files, source), _Chosen(source, key)
    rows = (row for file in files for row in read_rows(file, form, chosen, {}, cut=len(files) < FEW_FILES))
    lengths = [sum(len(str(value)) for value in row.values()) for row in islice(_whole(rows), ROWS)]
    if not lengths:
        raise TaskError(f"{key}: {source} has no rows.")
    return _measured(chosen.look, lengths)


def _whole(rows: Iterable[Row]) -> Iterator[Mapping[str, Any]]:
    """The rows' values; raises what is wrong with the first one that is broken."""
    for _, row in rows:
        if isinstance(row, BadRow):
            raise row
        yield row


class _Chosen:
    """The columns that a file of the source is read by; the first file settles what its rows are."""

    def __init__(self, source: str, key: str) -> None:
        self.source, self.key = source, key
        self.look = Look("texts")
        self._columns: Columns | None = None

    def __call__(self, columns: Collection[str]) -> Columns:
        if self._columns is None:
            self._columns = self._first(columns)
        return self._columns

    def _first(self, columns: Collection[str]) -> Columns:
        if not columns:  # a file of text
            return Columns("text")
        shape = shape_of(columns, "text", SHAPES)
        if shape is not None:
            self.look = Look("chats", shape=next(name for name, each in SHAPES.items() if each is shape))
            return _columns_of(shape, columns)
        text = next((name for name in TEXTS_NAMED if name in columns), None)
        if text is None:
            known = "; ".join(f"{name} ({', '.join(each.needs)})" for name, each in SHAPES.items())
            raise TaskError(
                f"{self.key}: {self.source} has the columns {', '.join(sorted(columns))}, of which none is known to "
                f"hold texts. Rename one to text, or have those of: {known}."
            )
        label = next((name for name in LABELS_NAMED if name in columns), None)
        self.look = Look("labels" if label else "texts", text_column=text, label_column=label)
        return Columns(text, label)


def _columns_of(shape: Shape, columns: Collection[str]) -> Columns:
    takes = tuple(name for name in shape.takes if name in columns)
    return Columns(shape.needs[0], None, (*shape.needs[1:], *takes))


def _measured(look: Look, lengths: Iterable[int]) -> Look:
    ordered = sorted(lengths)
    return Look(
        look.kind, len(ordered), len(ordered) < ROWS, ordered[int(0.95 * (len(ordered) - 1))], look.shape,
        look.text_column, look.label_column,
    )  # fmt: skip


def purposes(look: Look) -> Iterator[str]:
    """What such data can teach, likeliest first: chat, text or classify."""
    likeliest = {"chats": ("chat",), "texts": ("text",), "labels": ("classify", "text")}
    yield from likeliest.get(look.kind, ("chat", "text", "classify"))
