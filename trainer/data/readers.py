"""Rows of data files, one at a time: text, JSON, csv, parquet, Arrow.

A reader cannot go on after it has raised, so what is wrong with one row is given in its place. What is wrong with a
whole file is raised.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from . import rows
from .errors import BadRow, TaskError, unknown
from .rows import Choose, Place, Row, check_columns, kind_of, pieces, too_long

# keyword arguments of each reader, as in `data.args`
ARGUMENTS = {
    "text": {"encoding", "sample_by"},
    "json": {"encoding", "field"},
    "csv": {"encoding", "sep"},
    "parquet": set[str](),
    "arrow": set[str](),
}
SAMPLES = ("document", "paragraph", "line")
TABLE_ROWS = 100  # of a table, as Python objects at a time
MARKS = {  # that a file begins with in other encodings; the longer ones first
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not utf-8, as `surrogateescape` reads it


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
        if kind in ("parquet", "arrow"):
            yield from _table(file, kind, choose)
            return
        with _opened(file, args.get("encoding"), newline="" if kind == "csv" else None) as text:
            if kind == "text":
                yield from _text(text, file, choose(()).text, args.get("sample_by", "document"), cut)
            else:
                yield from (_json if kind == "json" else _csv)(text, file, choose, args)
    except UnicodeDecodeError as error:
        raise _not(error.encoding, file, error.object[error.start], error.reason) from error
    except LookupError as error:
        raise TaskError(f"data.args.encoding: {error}.") from error
    except OSError as error:
        raise TaskError(f"data.source: cannot read {file}: {error}") from error


def _opened(file: Path, encoding: str | None, newline: str | None) -> TextIO:
    if encoding is not None:
        return open(file, encoding=encoding, newline=newline)
    with open(file, "rb") as raw:
        start = raw.read(4)
    other = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if other:
        raise _not("utf-8", file, start[0], f"it begins as {other} does", other)
    # utf-8-sig: a byte order mark is none of the text
    return open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _not(encoding: str, where: object, byte: int, why: str, other: str = "") -> TaskError:
    fix = other or "latin-1}, utf-16 or whatever it is in"
    return TaskError(
        f"data.source: {where} is not {encoding} (byte 0x{byte:02x}: {why}). Set data.args: {{encoding: {fix}"
        + ("}." if other else ".")
    )


def _undecoded(place: Place, text: str) -> BadRow | None:
    """What is wrong with a text that has bytes which are not utf-8."""
    undecoded = None if text.isascii() else _ESCAPED.search(text)
    if undecoded is None:
        return None
    return BadRow(str(_not("utf-8", place, ord(undecoded[0]) - 0xDC00, "no character")), "not utf-8")


# -- text, JSON, csv ---------------------------------------------------------------------------------------------------
def _text(text: TextIO, file: Path, column: str, sample_by: str, cut: bool) -> Iterator[Row]:
    if sample_by == "line":
        parts: Iterator[str] = (line.rstrip("\n") for line in text)
    elif sample_by == "paragraph":
        parts = _paragraphs(text)
    else:
        parts = pieces(text) if cut else iter([text.read()])
    for number, part in enumerate(parts, 1):
        place = Place(str(file), number)
        yield place, _undecoded(place, part) or {column: part}


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


def _json(text: TextIO, file: Path, choose: Choose, args: Mapping[str, Any]) -> Iterator[Row]:
    """JSON lines, or one array of objects; with `field`, the array under that key of one object."""
    rows = _json_whole(text, file, args["field"]) if "field" in args else _json_rows(text, file)
    checked = False
    for number, row in rows:
        place = Place(str(file), number)
        if not isinstance(row, Mapping | BadRow):
            said = f'data.source: {place} is {kind_of(row)}; a row is an object such as {{"text": …}}.'
            row = BadRow(said, "no object")
        if not checked and not isinstance(row, BadRow):
            check_columns(f"{place}: ", choose(row), row)
            checked = True
        yield place, row


def _json_rows(text: TextIO, file: Path) -> Iterator[tuple[int, Any]]:
    lines = ((number, line) for number, line in _lines(text) if line is None or line.strip())
    first = True
    for number, line in lines:
        opens, first = first, False
        place = Place(str(file), number)
        bad = too_long(place) if line is None else _undecoded(place, line)
        if line is None or bad:
            yield number, bad
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if opens and (line.strip() == "{" or line.lstrip().startswith("[")):  # one value over many lines
                yield from _json_whole(io.StringIO(line + text.read()), file, None)
                return
            said = f"data.source: {file}, line {number} is not JSON: {error}. Fix the line, or remove it."
            yield number, BadRow(said, "not JSON")
            continue
        more = next(lines, None) if opens and isinstance(row, list) else None
        if more is not None:
            lines = chain([more], lines)  # type: ignore[assignment]
        elif opens and isinstance(row, list):
            yield from enumerate(row, 1)
            return
        yield number, row


def _lines(text: TextIO) -> Iterator[tuple[int, str | None]]:
    """Lines with their numbers; None for one that is too long, of which no more is held than is allowed."""
    number = 0
    while line := text.readline(rows.LONGEST + 1):
        number += 1
        if len(line) <= rows.LONGEST or line.endswith("\n"):
            yield number, line
            continue
        while line and not line.endswith("\n"):
            line = text.readline(rows.LONGEST)
        yield number, None


def _json_whole(text: TextIO, file: Path, field: str | None) -> Iterator[tuple[int, Any]]:
    whole = text.read()
    if bad := _undecoded(Place(str(file), 1), whole):
        raise bad
    try:
        value = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"data.source: {file} is not JSON: {error}. A row a line is read, or one list.") from error
    if field is not None:
        if not isinstance(value, Mapping) or not isinstance(value.get(field), list):
            raise TaskError(f"data.args.field: {file} has no list under {field!r}.")
        value = value[field]
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _csv(text: TextIO, file: Path, choose: Choose, args: Mapping[str, Any]) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, rows.LONGEST))  # a field is a document; the default is 128 KiB
    separator = args.get("sep", "\t" if file.suffix.lower() == ".tsv" else ",")
    reader = csv.reader(text, delimiter=separator)
    header = next(reader, [])
    if header:
        check_columns(f"{file}: ", choose(header), header, hint=_other_separator(header, separator))
    number = 0
    while True:
        began = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            place = Place(str(file), number)
            yield place, BadRow(f"data.source: {place} (line {began}): {error}. Fix it, or remove it.", "not csv")
            continue
        if not fields:
            continue  # an empty line
        number += 1
        place = Place(str(file), number)
        yield place, _fields(place, began, reader.line_num, header, fields)


def _fields(place: Place, began: int, ended: int, header: list[str], fields: list[str]) -> dict[str, str] | BadRow:
    if len(fields) != len(header):
        lines = f"line {began}" if began == ended else f"lines {began} to {ended}; is a quote left open?"
        said = f"data.source: {place} ({lines}) has {len(fields)} fields and the header {len(header)}. Quote the field "
        return BadRow(f"{said}that holds a separator, or add the one that is missing.", "other fields than the header")
    for value in fields:
        if bad := _undecoded(place, value):
            return bad
    return dict(zip(header, fields, strict=True))


def _other_separator(header: list[str], separator: str) -> str:
    """What to do where a header is one field that holds another separator."""
    sep = next((other for other in ";\t|," if other != separator and len(header) == 1 and other in header[0]), None)
    return f" Fields seem to be separated by {sep!r}: set data.args: {{sep: {json.dumps(sep)}}}." if sep else ""


# -- tables ------------------------------------------------------------------------------------------------------------
def _table(file: Path, kind: str, choose: Choose) -> Iterator[Row]:
    import pyarrow

    try:
        with (_parquet if kind == "parquet" else _arrow)(file) as (names, batches):
            columns = choose(names)
            check_columns(f"{file}: ", columns, names)
            number = 0
            for batch in batches(list(dict.fromkeys(columns.all))):
                for start in range(0, batch.num_rows, TABLE_ROWS):
                    for row in batch.slice(start, TABLE_ROWS).to_pylist():
                        number += 1
                        place = Place(str(file), number)
                        long = any(isinstance(value, str) and len(value) > rows.LONGEST for value in row.values())
                        yield place, too_long(place) if long else row
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's, not the file's
            raise
        why = str(error).splitlines()[0]
        raise TaskError(
            f"data.source: cannot read {file}: {why} It is cut off, or no {kind} file: copy or make it anew."
        ) from error


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        yield table.schema_arrow.names, lambda columns: table.iter_batches(10 * TABLE_ROWS, columns=columns)


@contextmanager
def _arrow(file: Path) -> Iterator[Any]:
    """An Arrow file of either kind: with a footer (Feather), or a stream, as Hugging Face's datasets keep them."""
    import pyarrow

    with pyarrow.OSFile(str(file)) as opened:
        try:
            reader = pyarrow.ipc.open_file(opened)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            opened.seek(0)
            reader = batches = pyarrow.ipc.open_stream(opened)
        yield reader.schema.names, lambda columns: (batch.select(columns) for batch in batches)
