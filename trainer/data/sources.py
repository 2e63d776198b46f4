"""Where texts come from: what the machine carries, files here, or the hub; each gives a `Corpus`.

What is read is checked row by row and kept once (see `kept`). Files are keyed by their bytes, not by time stamps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import corpora, installed
from .cache import digest, file_digest
from .corpora import Corpus
from .docstring_preferences import docstring_preferences
from .errors import TaskError, unknown
from .kept import kept_corpus
from .labels import Kind
from .paths import SHAPED, file_format, find_files, one_format
from .readers import check_arguments, read_rows
from .rows import Place, Row, check_columns
from .shapes import Reading, Shape

TEXTS: dict[str, Callable[..., Corpus]] = {
    "python-stdlib": corpora.python_stdlib,
    "python-packages": corpora.python_packages,
    "python-docstrings": installed.python_docstrings,
    "docstring-preferences": docstring_preferences,
    "package-descriptions": installed.package_descriptions,
}
FEW_FILES = 20  # below this, a validation split by whole files would be coarse


def load_corpus(
    data: Any, source: str, args: dict[str, Any], *, cache: Path, labelled: bool, key: str = "data.source",
    only: Mapping[str, Shape] | None = None, kind: Kind = "single-label",
) -> Corpus:  # fmt: skip
    """The corpus that `data.source` (or a path in `data.validation`) names.

    data: the recipe's data section. args: its keyword arguments for the reader. labelled: also read
    `data.label_column`, as labels of that kind. key: the recipe's key that names the source, for errors. only: the
    shapes that rows must have one of. Raises `TaskError` where the source, its format or a column does not exist, and
    where a row cannot be trained on, unless `data.bad_rows` is skip.
    """
    if data.format == "builtin" and source not in TEXTS:
        raise unknown(f"{key} with format: builtin", source, TEXTS)
    if source in TEXTS and data.format in ("auto", "builtin"):
        return _builtin(source, data.limit, args)
    shape = data.format if data.format in SHAPED else None
    label = data.label_column if labelled else None
    named = data.columns.model_dump(exclude_none=True)
    reading = Reading(data.text_column, label, shape, chats=not labelled, named=named, only=only, kind=kind)
    wanted = file_format(data.format)
    files = [] if data.format == "hub" else find_files(source, wanted, key=key)
    used = digest(["3", reading.key, str(data.limit)])  # 3: of the form in which rows are kept
    if files:
        rows, content = _file_rows(files, wanted or one_format(files, source), reading, args, cache)
    else:
        rows, content = _hub_rows(source, data, reading, args)
    used = digest([content, used])
    skip = data.bad_rows == "skip"
    return kept_corpus(rows, reading, data.limit, cache / "rows" / used, used, source, skip=skip)


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
