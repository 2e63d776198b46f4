"""Where texts come from: what the machine carries, files here, or the hub; each gives a `Corpus`.

What is read is kept once as an Arrow file, checked row by row, and then only mapped into memory. Files are keyed by
their bytes, not by time stamps.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import corpora
from .cache import build_once, digest, file_digest
from .corpora import Corpus
from .errors import TaskError, unknown
from .labels import Kind, check_classes, check_words, read_label
from .paths import SHAPED, file_format, find_files, one_format
from .rows import Place, Row, check_arguments, check_columns, read_rows
from .shapes import Reading

TEXTS: dict[str, Callable[..., Corpus]] = {
    "python-stdlib": corpora.python_stdlib,
    "python-packages": corpora.python_packages,
}
FEW_FILES = 20  # below this, a validation split by whole files would be coarse
ROWS, CHARACTERS = 1000, 1 << 20  # of one write


def load_corpus(
    data: Any, source: str, args: dict[str, Any], *, cache: Path, labelled: bool, key: str = "data.source",
    kind: Kind = "single-label",
) -> Corpus:  # fmt: skip
    """The corpus that `data.source` (or a path in `data.validation`) names.

    data: the recipe's data section. args: its keyword arguments for the reader. labelled: also read
    `data.label_column`, as labels of that kind. key: the recipe's key that names the source, for errors. Raises
    `TaskError` where the source, its format or a column does not exist, and where a row cannot be trained on.
    """
    if data.format == "builtin" and source not in TEXTS:
        raise unknown(f"{key} with format: builtin", source, TEXTS)
    if source in TEXTS and data.format in ("auto", "builtin"):
        return _builtin(source, data.limit, args)
    shape = data.format if data.format in SHAPED else None
    reading = Reading(data.text_column, data.label_column if labelled else None, shape, chats=not labelled, kind=kind)
    wanted = file_format(data.format)
    files = [] if data.format == "hub" else find_files(source, wanted, key=key)
    used = digest([reading.key, str(data.limit)])
    if files:
        rows, content = _file_rows(files, wanted or one_format(files, source), reading, args, cache)
    else:
        rows, content = _hub_rows(source, data, reading, args)
    used = digest([content, used])
    return _kept(rows, reading, data.limit, cache / "rows" / used, used, source)


def _builtin(source: str, limit: int | None, args: dict[str, Any]) -> Corpus:
    allowed = set(inspect.signature(TEXTS[source]).parameters) - {"limit"}
    for name in args:
        if name not in allowed:
            raise unknown(f"data.args of {source}", name, allowed)
    return TEXTS[source](limit=limit, **args)


def _file_rows(
    files: list[Path], kind: str, reading: Reading, args: dict[str, Any], cache: Path
) -> tuple[Iterable[Row], str]:
    check_arguments(kind, args)
    cut = len(files) < FEW_FILES
    content = digest(
        [kind, str(cut), repr(sorted(args.items())), *(f"{f.suffix.lower()} {file_digest(f, cache)}" for f in files)]
    )
    return (row for file in files for row in read_rows(file, kind, reading.columns, args, cut=cut)), content


def _hub_rows(source: str, data: Any, reading: Reading, args: dict[str, Any]) -> tuple[Iterable[Row], str]:
    if data.format not in ("auto", "hub", *SHAPED):
        raise TaskError(f"data.source {source!r} is no file here, so data.format: {data.format} cannot read it.")
    table = _load(source, split=data.split, **args)
    columns = reading.columns(table.column_names)
    check_columns("", columns, table.column_names)
    feature = table.features[columns.label] if columns.label else None
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of one class, or of a list of them

    def rows() -> Iterator[Row]:
        kept = table.select_columns(columns.all)
        for number, row in enumerate(kept, 1):
            if names:
                row[columns.label] = _named(row[columns.label], names)
            yield Place(f"{source} ({data.split})", number), row

    # the hub's own key of (data set, configuration, revision, split)
    return rows(), digest([source, data.split, table._fingerprint])


def _named(label: Any, names: list[str]) -> Any:
    """A label as its class's name, where it is a number of one."""
    if isinstance(label, list):
        return [_named(each, names) for each in label]
    return names[label] if isinstance(label, int) else label


def _load(source: str, **settings: Any) -> Any:
    import datasets

    quiet = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, **settings)
    except Exception as error:  # it raises its own types, ValueError, ConnectionError ... each with a cause
        raise TaskError(f"data.source: cannot read {source}: {_cause(error)}") from error
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


# -- kept on disk ------------------------------------------------------------------------------------------------------
def _kept(rows: Iterable[Row], reading: Reading, limit: int | None, folder: Path, key: str, source: str) -> Corpus:
    """The corpus of these rows, written to `folder` by the first process that asks."""
    import datasets

    build_once(folder, lambda private: _write(rows, reading, limit, private, source))
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    about = json.loads((folder / "about.json").read_text())
    labels = None if reading.label is None else list(table["label"])
    return Corpus(table["text"], labels, None, key, skipped=about["skipped"], shaped=about["shaped"])


def _write(rows: Iterable[Row], reading: Reading, limit: int | None, folder: Path, source: str) -> None:
    import pyarrow

    names = ["text", "label"][: 1 if reading.label is None else 2]
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    classes: dict[str, Place] = {}
    count = skipped = 0
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        held: list[dict[str, str]] = []
        characters = 0
        for place, row in rows:
            if count == limit:
                break
            text = reading.text(place, row)
            if not text.strip():
                skipped += 1
                continue
            kept = {"text": _encodable(text)}
            if reading.label is not None:
                kept["label"] = label = read_label(reading.kind, place, row, reading.label)
                if reading.kind == "words":
                    check_words(place, text, label)
                if reading.kind == "single-label":
                    classes.setdefault(label, place)
            held.append(kept)
            count, characters = count + 1, characters + len(text)
            if len(held) == ROWS or characters > CHARACTERS:
                stream.write_batch(pyarrow.RecordBatch.from_pylist(held, schema=schema))
                held, characters = [], 0
        stream.write_batch(pyarrow.RecordBatch.from_pylist(held, schema=schema))
    if not count:
        raise TaskError(f"data.source: {source} has no text" + (f": all {skipped} rows are empty." if skipped else "."))
    if reading.label is not None:
        check_classes(classes, count, reading.label)
    (folder / "about.json").write_text(json.dumps({"skipped": skipped, "shaped": reading.shape is not None}))


def _encodable(text: str) -> str:
    """The text with each lone surrogate, which JSON can spell and UTF-8 cannot, as a replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
