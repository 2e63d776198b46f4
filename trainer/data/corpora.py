"""Real text and images that every machine already has: they make the shipped recipes run offline.

A `Corpus` is texts with, per text, a label (for classification) and a group. The group is what a validation split
must not cut: two chunks of one file share it, so no file is ever on both sides.
"""

from __future__ import annotations

import ast
import io
import os
import sysconfig
import tokenize
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from .cache import digest
from .errors import TaskError

# Tests, caches and third-party packages are not the standard library's own code.
EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
BATCH = 1 << 20  # characters read at a time
WINDOW = 12  # lines of code in one labelled chunk


class Chained(Sequence[str]):
    """Several sequences of texts one after another."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self.parts, self._starts = parts, list(accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part = bisect_right(self._starts, index) - 1
        return self.parts[part][index - self._starts[part]]


class Picked(Sequence[str]):
    """A choice of another sequence's texts that copies none of them: a column on disk stays on disk."""

    def __init__(self, base: Any, indices: Sequence[int] | np.ndarray) -> None:
        nested = isinstance(base, Picked)
        self.base = base.base if nested else base
        self.indices = base.indices[np.asarray(indices)] if nested else np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self.base[self.indices[index]]
        # a dataset column answers a list of rows in one read
        rows = self.indices[index]
        return [self.base[i] for i in rows] if isinstance(self.base, list) else list(self.base[rows])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 1000):
            yield from self[start : start + 1000]


@dataclass(frozen=True)
class Corpus:
    """Texts before tokenization.

    texts: the documents, in a fixed order. labels: one per text, or None. groups: one per text, or None where each
    text stands for itself. fingerprint: equal exactly when the content is; the caches are keyed by it. skipped: rows of
    the source that have no text and are left out. shaped: the texts are rows in their canonical form (see `shapes`).
    bad: rows that cannot be read and are left out, by reason. places: where each label stands first, if that is known.
    """

    texts: Sequence[str]
    labels: Sequence[Any] | None
    groups: Sequence[str] | None
    fingerprint: str
    skipped: int = 0
    shaped: bool = False
    bad: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def take(self, indices: Sequence[int] | np.ndarray) -> Corpus:
        """The corpus at these indices, in this order."""
        return Corpus(
            texts=Picked(self.texts, indices),
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            groups=None if self.groups is None else [self.groups[i] for i in indices],
            fingerprint=digest([self.fingerprint, np.asarray(indices, dtype=np.int64).tobytes()]),
            shaped=self.shaped,
            places=self.places,
        )


def chained(corpora: Sequence[Corpus]) -> Corpus:
    """The texts of several corpora as one."""
    if len(corpora) == 1:
        return corpora[0]
    reasons = {reason for corpus in corpora for reason in corpus.bad}
    return Corpus(
        texts=Chained([corpus.texts for corpus in corpora]),
        labels=None,
        groups=None,
        fingerprint=digest([corpus.fingerprint for corpus in corpora]),
        skipped=sum(corpus.skipped for corpus in corpora),
        bad={reason: sum(corpus.bad.get(reason, 0) for corpus in corpora) for reason in sorted(reasons)},
    )


def in_batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """All texts in order, about a million characters at a time: memory does not grow with them or their number."""
    start, rows = 0, 16
    while start < len(texts):
        batch = [text or "" for text in texts[start : start + rows]]
        yield batch
        start += len(batch)
        mean = max(1, sum(map(len, batch)) // len(batch))
        rows = max(1, min(2 * rows, BATCH // mean, 1000))


def of_texts(texts: Sequence[str], labels: Sequence[Any] | None = None, groups: Sequence[str] | None = None) -> Corpus:
    """A corpus held in memory, fingerprinted by its content."""
    return Corpus(texts, labels, groups, digest([*texts, *map(str, labels or ()), *(groups or ())]))


def python_stdlib(limit: int | None = None) -> Corpus:
    """The sources of the running Python's standard library, one document per file, sorted by path.

    About 12 MB in 700 files for CPython 3.11. The group is the path, so a validation split is by file.
    """
    files = list(islice(stdlib_sources(), limit))
    return of_texts([text for _, text in files], groups=[path for path, _ in files])


def python_packages(limit: int | None = None, packages: int = 10) -> Corpus:
    """Chunks of the standard library's largest packages, labelled with the package they are from.

    A chunk is a window of `WINDOW` non-empty lines (code, docstrings and comments as they come). Packages are ranked
    by source bytes among those with at least 5 files, so that each can give whole files to the validation split.
    limit: at most this many chunks, taken in turns from every package.
    """
    by_package: dict[str, list[tuple[str, str]]] = {}
    for path, text in stdlib_sources():
        if "/" in path:
            by_package.setdefault(path.split("/")[0], []).append((path, text))
    ranked = sorted(
        (name for name, files in by_package.items() if len(files) >= 5),
        key=lambda name: (-sum(len(text) for _, text in by_package[name]), name),
    )[:packages]
    chunks = {name: [(path, c) for path, text in by_package[name] for c in _windows(text)] for name in ranked}
    rows = [(chunk, name, path) for name in ranked for path, chunk in chunks[name]]
    if limit is not None:
        rows = _in_turns(rows, limit)
    return of_texts([r[0] for r in rows], labels=[r[1] for r in rows], groups=[r[2] for r in rows])


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's 1797 handwritten digits: float32 images [N, 1, 8, 8] in [0, 1] and int64 labels [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError("data.source 'digits' needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    return (bunch.images[:, None] / 16.0).astype("float32"), bunch.target.astype("int64")


def stdlib_trees() -> Iterator[tuple[str, str, ast.Module]]:
    """(Path, text, tree) of every source file of the standard library that can be parsed, sorted by path."""
    for path, text in stdlib_sources():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files
            try:
                yield path, text, ast.parse(text)
            except (SyntaxError, ValueError):
                continue


def stdlib_sources() -> Iterator[tuple[str, str]]:
    """(Path, text) of every source file of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in EXCLUDED]  # not entered: they are larger than the rest
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    for relative, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        if text := _source(path):
            yield relative, text


def _source(path: Path) -> str | None:
    """A source file's text in its declared encoding, or None where it is empty or not decodable."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding).replace("\r\n", "\n")
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _windows(text: str) -> Iterator[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    for start in range(0, len(lines) - WINDOW // 2, WINDOW):
        yield "\n".join(lines[start : start + WINDOW])


def _in_turns(rows: list[tuple[str, str, str]], limit: int) -> list[tuple[str, str, str]]:
    """At most `limit` rows, spread evenly over each label's rows, the labels taking turns."""
    by_label: dict[str, list[tuple[str, str, str]]] = {}
    for row in rows:
        by_label.setdefault(row[1], []).append(row)
    each = max(1, limit // len(by_label))
    spread = [[part[i * len(part) // each] for i in range(min(each, len(part)))] for part in by_label.values()]
    return [row for part in spread for row in part][:limit]
