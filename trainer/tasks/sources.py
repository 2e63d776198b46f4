"""Where texts come from: what the machine carries, files here, or the hub; each gives a `Corpus`.

Files and hub data sets are read with Hugging Face `datasets`. Files are keyed by their bytes, not by time stamps.
"""

from __future__ import annotations

import glob
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import corpora
from .cache import digest, file_digest
from .corpora import Corpus
from .errors import TaskError, unknown

TEXTS: dict[str, Callable[..., Corpus]] = {
    "python-stdlib": corpora.python_stdlib,
    "python-packages": corpora.python_packages,
}
SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst", ".py", ".tex"),
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
FEW_FILES = 20  # below this, a validation split by whole files would be coarse
PIECE = 1 << 16  # characters


def load_corpus(data: Any, source: str, args: dict[str, Any], *, cache: Path, labelled: bool) -> Corpus:
    """The corpus that `data.source` (or a path in `data.validation`) names.

    data: the recipe's data section. args: its keyword arguments for the reader. labelled: also read
    `data.label_column`. Raises `TaskError` where the source, its format or a column does not exist.
    """
    if data.format == "builtin" and source not in TEXTS:
        raise unknown("data.source with format: builtin", source, TEXTS)
    if source in TEXTS and data.format in ("auto", "builtin"):
        return _builtin(source, data.limit, args)
    files = [] if data.format == "hub" else find_files(source)
    if files:
        table, key = _read_files(files, data, args, cache)
    else:
        table, key = _read_hub(source, data, args)
    return _corpus(table, key, data, labelled)


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder or a glob names, sorted; empty where it names a hub data set.

    Something that looks like a path (`./x`, `/x`, `x/*.txt`, `x.csv`) and matches nothing is an error, so that a
    typing error is not looked up on the hub.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        known = {suffix for group in SUFFIXES.values() for suffix in group}
        files = [p for p in path.rglob("*") if p.is_file() and p.suffix in known]
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
    looks_local = source.startswith((".", "/", "~")) or any(c in source for c in "*?[") or _format_of(path) is not None
    if not files and (looks_local or path.is_dir()):
        raise TaskError(f"data.source {source!r} matches no file here (looked from {Path.cwd()}).")
    return sorted(files)


def _builtin(source: str, limit: int | None, args: dict[str, Any]) -> Corpus:
    allowed = set(inspect.signature(TEXTS[source]).parameters) - {"limit"}
    for name in args:
        if name not in allowed:
            raise unknown(f"data.args of {source}", name, allowed)
    return TEXTS[source](limit=limit, **args)


def _format_of(path: Path) -> str | None:
    return next((name for name, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)


def _read_files(files: list[Path], data: Any, args: dict[str, Any], cache: Path) -> tuple[Any, str]:
    kinds = {_format_of(f) for f in files} if data.format == "auto" else {data.format}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise TaskError(
            f"data.format: auto cannot determine the format of {data.source!r}. Set it to text, json, csv or parquet."
        )
    settings = {"sample_by": "document", **args} if kind == "text" else args
    key = digest([kind, repr(sorted(settings.items())), *(file_digest(file, cache) for file in files)])
    if any(f.suffix == ".tsv" for f in files):
        settings = {"sep": "\t", **settings}
    table = _load(kind, data_files=[str(f) for f in files], split="train", cache_dir=str(cache / key), **settings)
    if kind == "text" and "sample_by" not in args and len(files) < FEW_FILES:
        table = table.map(_cut, batched=True, batch_size=1)
    return table, key


def _read_hub(source: str, data: Any, args: dict[str, Any]) -> tuple[Any, str]:
    if data.format not in ("auto", "hub"):
        raise TaskError(f"data.source {source!r} is no file here, so data.format: {data.format} cannot read it.")
    table = _load(source, split=data.split, **args)
    # the hub's own key of (data set, configuration, revision, split)
    return table, digest([source, data.split, table._fingerprint])


def _load(kind: str, **settings: Any) -> Any:
    import datasets

    quiet = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, **settings)
    except Exception as error:  # it raises its own types, ValueError, ConnectionError, pyarrow's ... each with a cause
        what = settings.get("data_files") or kind
        raise TaskError(f"data.source: cannot read {what}: {_cause(error)}") from error
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _cut(batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {"text": [piece for text in batch["text"] for piece in pieces(text)]}


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A long text in pieces of at most `size` characters, cut after a line where there is one."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind("\n", start, start + size) + 1
        end = cut if cut > start else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _corpus(table: Any, key: str, data: Any, labelled: bool) -> Corpus:
    for name in ["text", "label"][: 1 + labelled]:
        column = getattr(data, f"{name}_column")
        if column not in table.column_names:
            raise unknown(f"data.{name}_column", column, table.column_names)
    if data.limit is not None:
        table = table.select(range(min(data.limit, len(table))))
    labels = _labels(table, data.label_column) if labelled else None
    used = [data.text_column, data.label_column if labelled else "", str(data.limit)]
    return Corpus(table[data.text_column], labels, None, digest([key, *used]))


def _labels(table: Any, column: str) -> list[Any]:
    names = getattr(table.features[column], "names", None)
    labels = list(table[column])
    if any(label is None for label in labels):
        raise TaskError(f"data.label_column {column!r}: row {labels.index(None)} has no label.")
    return [names[label] for label in labels] if names else labels
