"""Texts as token numbers, written once to disk and read by any number of processes.

A store is two files: all tokens of all documents end to end, and where each document starts; and a third one where only
some tokens are trained on.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .cache import build_once, digest
from .corpora import BATCH, in_batches
from .mapped import MappedNumbers
from .rows import pieces_of

if TYPE_CHECKING:
    from .chats import Tokens
    from .corpora import Corpus

Encode = Callable[[list[str]], Sequence[Sequence[int]]]
COUNTED = 1 << 22  # tokens looked at together
IGNORED = -100  # the label that cross entropy skips


@dataclass(frozen=True)
class TokenStore:
    """All tokens of a corpus on disk. Pickles as its path, so loader workers map the files instead of copying them."""

    folder: Path

    @cached_property
    def tokens(self) -> MappedNumbers:
        """Token numbers [N], uint16 or uint32, memory-mapped."""
        return MappedNumbers(self.folder / "tokens.bin", self.meta["dtype"])

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Return `dtype`, the number of `tokens`, and what `store_tokens` was told to keep."""
        return json.loads((self.folder / "meta.json").read_text())

    @cached_property
    def offsets(self) -> np.ndarray:
        """Starts of the documents and the end of the last one [D + 1], int64."""
        return np.load(self.folder / "offsets.npy")

    @cached_property
    def trained(self) -> MappedNumbers | None:
        """Whether each token is trained on [N], memory-mapped; None: all are."""
        path = self.folder / "trained.bin"
        return MappedNumbers(path, "bool") if path.exists() else None

    def document(self, index: int, length: int | None = None) -> np.ndarray:
        """The first `length` tokens of a document (all of them without it)."""
        start, end = self.offsets[index : index + 2]
        return self.tokens[start : end if length is None else min(end, start + length)]

    def labels(self, index: int, length: int | None = None) -> np.ndarray:
        """As `document`, in int64, with `IGNORED` where a token is not trained on; the first never is a target."""
        ids = self.document(index, length).astype(np.int64)
        if self.trained is None:
            return ids
        start = self.offsets[index]
        return np.where(self.trained[start : start + len(ids)], ids, IGNORED)

    def target_counts(self, length: int) -> np.ndarray:
        """Targets of each document cut to `length` tokens [D]: those trained on, but the first.

        Where only some tokens are, the first to ask counts them and leaves the counts beside the store.
        """
        if self.trained is None:
            return np.maximum(np.minimum(np.diff(self.offsets), length) - 1, 0)

        def build(folder: Path) -> None:
            np.save(folder / "counts.npy", np.concatenate(list(self._counted(length))))

        folder = build_once(self.folder.with_name(f"{self.folder.name}-targets-{length}"), build)
        return np.load(folder / "counts.npy")

    def _counted(self, length: int) -> Iterator[np.ndarray]:
        """Targets of the documents, some millions of tokens at a time."""
        starts, ends = self.offsets[:-1], self.offsets[1:]
        first = 0
        yield np.empty(0, dtype=np.int64)
        while first < len(starts):
            begin = starts[first]
            last = max(first + 1, int(np.searchsorted(starts, begin + COUNTED)))
            marks = self.trained[begin : ends[last - 1]] if self.trained is not None else ()
            before = np.concatenate([[0], np.cumsum(marks, dtype=np.int64)])
            some, until = starts[first:last] - begin, ends[first:last] - begin
            yield before[np.minimum(until, some + length)] - before[np.minimum(some + 1, until)]
            first = last

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}


def store_tokens(
    corpus: Corpus,
    encode: Encode,
    *,
    key: str,
    vocabulary: int,
    cache: Path,
    frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
    head: int | None = None,
    about: Callable[[], dict[str, int]] = dict,
) -> TokenStore:
    """Tokenize a corpus, or find it done: keyed by its content and by `key` (tokenizer and settings).

    Takes about a million characters at a time; a long document is encoded in pieces that end after lines, so memory
    depends neither on the corpus nor on its longest document. frame: the tokens that open and close a document. head:
    characters of a document to encode at most; None: all. about: what to keep beside the tokens, once they are there.
    """

    def build(folder: Path) -> None:
        dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
        offsets, written = array("q", [0]), 0
        with open(folder / "tokens.bin", "wb") as file:
            for group in _groups(corpus.texts, head):
                for row, piece in zip(encode([piece.text for piece in group]), group, strict=True):
                    whole = [*(frame[0] if piece.opens else ()), *row, *(frame[1] if piece.closes else ())]
                    file.write(np.array(whole, dtype=dtype).tobytes())
                    written += len(whole)
                    if piece.closes:
                        offsets.append(written)
        np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
        (folder / "meta.json").write_text(json.dumps({"dtype": np.dtype(dtype).name, "tokens": written, **about()}))

    return TokenStore(build_once(cache / "tokens" / digest([corpus.fingerprint, key]), build))


def store_answers(
    corpus: Corpus, answers: Callable[[list[str]], list[Tokens]], *, key: str, vocabulary: int, cache: Path,
    about: Callable[[], dict[str, int]] = dict,
) -> TokenStore:  # fmt: skip
    """Tokenize a corpus of canonical rows, with what is trained on (`chats.Answers`); see `store_tokens`."""

    def build(folder: Path) -> None:
        dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
        offsets, written = array("q", [0]), 0
        with open(folder / "tokens.bin", "wb") as file, open(folder / "trained.bin", "wb") as marks:
            for batch in in_batches(corpus.texts):
                for ids, trained in answers(batch):
                    file.write(np.array(ids, dtype=dtype).tobytes())
                    marks.write(np.array(trained, dtype=bool).tobytes())
                    written += len(ids)
                    offsets.append(written)
        np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
        (folder / "meta.json").write_text(json.dumps({"dtype": np.dtype(dtype).name, "tokens": written, **about()}))

    return TokenStore(build_once(cache / "tokens" / digest([corpus.fingerprint, key]), build))


class _Piece(NamedTuple):
    """A part of a document; opens, closes: whether it is its first, its last."""

    text: str
    opens: bool
    closes: bool


def _groups(texts: Sequence[str], head: int | None) -> Iterator[list[_Piece]]:
    """All documents in pieces, about a million characters at a time."""
    group: list[_Piece] = []
    characters = 0
    for batch in in_batches(texts):
        for text in batch:
            for piece in _cut(text) if head is None else [_Piece(text[:head], True, True)]:
                group.append(piece)
                characters += len(piece.text)
                if characters >= BATCH:
                    yield group
                    group, characters = [], 0
    if group:
        yield group


def _cut(text: str) -> Iterator[_Piece]:
    held, opens = None, True
    for piece in pieces_of(text):
        if held is not None:
            yield _Piece(held, opens, False)
            opens = False
        held = piece
    yield _Piece(held or "", opens, True)
