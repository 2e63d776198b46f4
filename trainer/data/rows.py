"""Rows of data files, one at a time, each checked: a row that cannot be trained on is named with file and row.

Texts stay what they are: no number, date or missing value is guessed from `NA`, `null` or `007`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ...problems import clip
from .errors import TaskError, unknown

PIECE = 1 << 16  # characters
# keyword arguments of each reader, as in `data.args`
ARGUMENTS = {
    "text": {"encoding", "sample_by"},
    "json": {"encoding", "field"},
    "csv": {"encoding", "sep"},
    "parquet": set[str](),
}
SAMPLES = ("document", "paragraph", "line")


@dataclass(frozen=True)
class Columns:
    """The columns to read. label: None where texts are trained on alone. others: of rows that are more than a text."""

    text: str
    label: str | None = None
    others: tuple[str, ...] = ()

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


# a row before it is checked: its place, and its values by column
Row = tuple[Place, Mapping[str, Any]]
# the columns to read of those that a file has
Choose = Callable[[Collection[str]], Columns]


def check_arguments(kind: str, args: Mapping[str, Any]) -> None:
    """Raise `TaskError` for an argument that the reader of this format does not have."""
    for name in args:
        if name not in ARGUMENTS[kind]:
            raise unknown(f"data.args of {kind} files", name, ARGUMENTS[kind])
    if args.get("sample_by", "document") not in SAMPLES:
        raise unknown("data.args.sample_by", args["sample_by"], SAMPLES)


def read_rows(file: Path, kind: str, choose: Choose, args: Mapping[str, Any], *, cut: bool) -> Iterator[Row]:
    """The rows of a file in its order. cut: give a long text file in pieces."""
    try:
        if kind == "parquet":
            yield from _parquet(file, choose)
        else:
            # utf-8-sig: a byte order mark is none of the text
            with open(file, encoding=args.get("encoding", "utf-8-sig"), newline="" if kind == "csv" else None) as text:
                if kind == "text":
                    yield from _text(text, file, choose(()).text, args.get("sample_by", "document"), cut)
                else:
                    yield from (_json if kind == "json" else _csv)(text, file, choose, args)
    except UnicodeDecodeError as error:
        raise TaskError(
            f"data.source: {file} is not {error.encoding.removesuffix('-sig')} "
            f"(byte 0x{error.object[error.start]:02x}: {error.reason}). "
            "Set data.args: {encoding: latin-1}, utf-16 or whatever it is in."
        ) from error
    except LookupError as error:
        raise TaskError(f"data.args.encoding: {error}.") from error
    except (OSError, csv.Error) as error:
        raise TaskError(f"data.source: cannot read {file}: {error}") from error


def text_of(place: Place, row: Mapping[str, Any], column: str, key: str = "data.text_column") -> str:
    """The text of a row; raises `TaskError` where there is none. key: the recipe's, for errors."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        has = "" if column in row else f" (it has {', '.join(map(repr, row)) or 'nothing'})"
        raise TaskError(f"{key}: {place} has no {column!r}{has}. Take the row out, or give it a text.")
    raise TaskError(f"{key} {column!r}: {place} is {kind_of(value)}, found {clip(str(value))}; a text is needed.")


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


# -- formats -----------------------------------------------------------------------------------------------------------
def _text(text: TextIO, file: Path, column: str, sample_by: str, cut: bool) -> Iterator[Row]:
    if sample_by == "line":
        parts: Iterator[str] = (line.rstrip("\n") for line in text)
    elif sample_by == "paragraph":
        parts = _paragraphs(text)
    else:
        parts = pieces(text) if cut else iter([text.read()])
    for number, part in enumerate(parts, 1):
        yield Place(str(file), number), {column: part}


def _paragraphs(text: TextIO) -> Iterator[str]:
    lines: list[str] = []
    for line in text:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines.clear()
    if lines:
        yield "".join(lines).rstrip("\n")


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


def _json(text: TextIO, file: Path, choose: Choose, args: Mapping[str, Any]) -> Iterator[Row]:
    """JSON lines, or one array of objects; with `field`, the array under that key of one object."""
    rows = _json_whole(text, file, args["field"]) if "field" in args else _json_rows(text, file)
    checked = False
    for number, row in rows:
        place = Place(str(file), number)
        if not isinstance(row, Mapping):
            raise TaskError(f'data.source: {place} is {kind_of(row)}; a row is an object such as {{"text": …}}.')
        if not checked:
            check_columns(f"{place}: ", choose(row), row)
            checked = True
        yield place, row


def _json_rows(text: TextIO, file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            yield from _json_whole(io.StringIO(line + text.read()), file, None)
            return
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == 1 and line.strip() == "{":  # one object over many lines
                yield from _json_whole(io.StringIO(line + text.read()), file, None)
                return
            raise TaskError(f"data.source: {file}, line {number} is not JSON: {error}") from error
        yield number, row


def _json_whole(text: TextIO, file: Path, field: str | None) -> Iterator[tuple[int, Any]]:
    try:
        whole = json.load(text)
    except ValueError as error:
        raise TaskError(f"data.source: {file} is not JSON: {error}") from error
    if field is not None:
        if not isinstance(whole, Mapping) or not isinstance(whole.get(field), list):
            raise TaskError(f"data.args.field: {file} has no list under {field!r}.")
        whole = whole[field]
    yield from enumerate(whole if isinstance(whole, list) else [whole], 1)


def _csv(text: TextIO, file: Path, choose: Choose, args: Mapping[str, Any]) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a field is a document; the default is 128 KiB
    separator = args.get("sep", "\t" if file.suffix.lower() == ".tsv" else ",")
    reader = csv.reader(text, delimiter=separator)
    header = next(reader, [])
    if header:
        check_columns(f"{file}: ", choose(header), header, hint=_other_separator(header, separator))
    for number, fields in enumerate(reader, 1):
        if not fields:
            continue  # an empty line
        place = Place(str(file), number)
        if len(fields) != len(header):
            raise TaskError(
                f"data.source: {place} (line {reader.line_num}) has {len(fields)} fields and the header {len(header)}."
            )
        yield place, dict(zip(header, fields, strict=True))


def _other_separator(header: list[str], separator: str) -> str:
    """What to do where a header is one field that holds another separator."""
    found = next((other for other in ";\t|," if other != separator and len(header) == 1 and other in header[0]), None)
    return f" Fields seem to be separated by {found!r}: set data.args: {{sep: {json.dumps(found)}}}." if found else ""


def _parquet(file: Path, choose: Choose) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            columns = choose(table.schema_arrow.names)
            check_columns(f"{file}: ", columns, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(1000, columns=columns.all):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(str(file), number), row
    except pyarrow.ArrowException as error:
        raise TaskError(f"data.source: cannot read {file}: {error}") from error


def check_columns(where: str, columns: Columns, found: Any, hint: str = "") -> None:
    """Raise `TaskError` where a column is not among those found."""
    for name in columns.all:
        if name in found:
            continue
        key = "label_column" if name == columns.label else "format" if columns.others else "text_column"
        nested = isinstance(found, Mapping) and next((k for k, v in found.items() if isinstance(v, list)), None)
        if nested and not hint:
            hint = f" If the rows are under {nested!r}, set data.args: {{field: {nested}}}."
        raise TaskError(f"{where}{unknown(f'data.{key}', name, found)}{hint}")
