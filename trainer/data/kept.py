"""Checked rows as a corpus, kept on disk: written once, and read a batch at a time.

Nothing is mapped into memory: a long pass over a large file then makes no process look large.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cache import build_once
from .corpora import Corpus
from .errors import BadRow, TaskError
from .labels import check_classes, check_words, is_number, read_label
from .rows import Place, Row
from .shapes import Reading

ROWS, CHARACTERS = 1000, 1 << 20  # of one write
WAY_OUT = "Or leave such rows out, and count them: data.bad_rows: skip."


class KeptTexts(Sequence[str]):
    """The texts that `kept_corpus` has written. Neighbours are read together."""

    def __init__(self, folder: Path, starts: Sequence[int], column: str = "text") -> None:
        import pyarrow

        self._reader = pyarrow.ipc.open_file(pyarrow.OSFile(str(folder / "rows.arrow")))
        self._starts, self._column = starts, column
        self._first, self._held = 0, list[str]()  # one batch, and the number of its first row

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        """A text; for a slice or several numbers, a list of texts."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not isinstance(index, int | np.integer):
            return [self[i] for i in np.asarray(index).tolist()]
        row = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if not self._first <= row < self._first + len(self._held):
            batch = bisect_right(self._starts, row) - 1
            self._first = self._starts[batch]
            self._held = self._reader.get_batch(batch).column(self._column).to_pylist()
        return self._held[row - self._first]


def kept_corpus(
    rows: Iterable[Row], reading: Reading, limit: int | None, folder: Path, key: str, source: str, *, skip: bool
) -> Corpus:
    """The corpus of these rows, written to `folder` by the first process that asks.

    skip: a row that cannot be trained on is counted and left out; else it is refused.
    """
    build_once(folder, lambda private: _Writer(reading, private, skip).write(rows, limit, source))
    about = json.loads((folder / "about.json").read_text())
    if about["bad"] and not skip:  # written when they were to be skipped
        raise TaskError(f"{about['first_bad']} {WAY_OUT}")
    starts = about["starts"]
    labels = None if reading.label is None else list(KeptTexts(folder, starts, "label"))
    return Corpus(
        KeptTexts(folder, starts), labels, None, key, skipped=about["skipped"], shaped=about["shaped"],
        bad=about["bad"], places=about["places"],
    )  # fmt: skip


class _Writer:
    """Rows on their way to disk."""

    def __init__(self, reading: Reading, folder: Path, skip: bool) -> None:
        self.reading, self.folder, self.skip = reading, folder, skip
        self.classes: dict[str, Place] = {}
        self.kinds: dict[str, tuple[Place, Any]] = {}  # of labels: the first number, the first word
        self.skipped, self.bad, self.first_bad = 0, Counter[str](), ""

    def write(self, rows: Iterable[Row], limit: int | None, source: str) -> None:
        import pyarrow

        names = ["text", "label"][: 1 if self.reading.label is None else 2]
        schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
        count, starts = 0, [0]
        path = str(self.folder / "rows.arrow")
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_file(file, schema) as written:
            held: list[dict[str, str]] = []
            characters = 0
            for place, row in rows:
                if count == limit:
                    break
                kept = self._checked(place, row)
                if kept is None:
                    continue
                held.append(kept)
                count, characters = count + 1, characters + len(kept["text"])
                if len(held) == ROWS or characters > CHARACTERS:
                    written.write_batch(pyarrow.RecordBatch.from_pylist(held, schema=schema))
                    starts.append(count)
                    held, characters = [], 0
            if held:
                written.write_batch(pyarrow.RecordBatch.from_pylist(held, schema=schema))
                starts.append(count)
        if not count:
            raise TaskError(f"data.source: {source} has no text{self._why_none()}")
        if self.reading.label is not None:
            self._check_classes(count, self.reading.label)
        about = {
            "skipped": self.skipped, "shaped": self.reading.shape is not None, "starts": starts,
            "bad": dict(self.bad), "first_bad": self.first_bad,
            "places": {label: str(place) for label, place in self.classes.items()},
        }  # fmt: skip
        (self.folder / "about.json").write_text(json.dumps(about))

    def _checked(self, place: Place, row: Mapping[str, Any] | BadRow) -> dict[str, str] | None:
        """What is kept of a row; None where it is left out."""
        try:
            if isinstance(row, BadRow):
                raise row
            text = self.reading.text(place, row)
            if not text.strip():
                self.skipped += 1
                return None
            kept = {"text": _encodable(text)}
            if self.reading.label is not None:
                kept["label"] = label = read_label(self.reading.kind, place, row, self.reading.label)
                if self.reading.kind == "words":
                    check_words(place, text, label)
                if self.reading.kind == "single-label":
                    self.classes.setdefault(label, place)
                    self._note_kind(place, row[self.reading.label])
        except BadRow as bad:
            if not self.skip:
                raise BadRow(f"{bad} {WAY_OUT}", bad.reason) from bad
            self.bad[bad.reason] += 1
            self.first_bad = self.first_bad or str(bad)
            return None
        return kept

    def _why_none(self) -> str:
        if self.bad:
            return f": none of its rows can be read. The first: {self.first_bad}"
        if self.skipped:
            return f": all {self.skipped} rows are empty."
        return ": it is empty. Name another file, or fill it."

    def _note_kind(self, place: Place, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            self.kinds.setdefault("number", (place, value))
        elif isinstance(value, str) and not is_number(value):
            self.kinds.setdefault("word", (place, value))

    def _check_classes(self, count: int, column: str) -> None:
        """Refuse a column of numbers to be predicted, of names that hardly repeat, or of numbers and words."""
        if len(self.kinds) == 2:
            (numbered, number), (named, word) = self.kinds["number"], self.kinds["word"]
            raise TaskError(
                f"data.label_column {column!r} has a number, {number}, in {numbered}, and a word, {word!r}, in "
                f"{named}. Write the labels alike: all as texts, or all as numbers."
            )
        check_classes(self.classes, count, column)


def _encodable(text: str) -> str:
    """The text with each lone surrogate, which JSON can spell and UTF-8 cannot, as a replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
