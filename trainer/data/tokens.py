"""Texts as token numbers: written once to disk, read by any number of processes, served as samples.

A store is two files: all tokens of all documents end to end, and where each document starts; and a third one where only
some tokens are trained on. Data sets that read it: `Blocks` cuts the stream into blocks of one length (packing),
`Documents` gives one document a sample, and `packing.Packed` fills samples with whole documents.

**How packed documents are kept apart.** Every document opens with a separator token. `position_ids` restart at each
separator, from which transformers builds a block-diagonal causal mask, so no document attends to another. The only
target that crosses a border is the separator itself, predicted from the document that ends there: that is what
"the document ends here" means, so no label is masked and every block has exactly `length - 1` targets.
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
import torch
from torch.utils.data import Dataset

from .cache import build_once, digest
from .corpora import BATCH, in_batches
from .rows import pieces_of

if TYPE_CHECKING:
    from .chats import Answers
    from .corpora import Corpus

Sample = dict[str, torch.Tensor]
Encode = Callable[[list[str]], Sequence[Sequence[int]]]
IGNORED = -100  # the label that cross entropy skips


@dataclass(frozen=True)
class TokenStore:
    """All tokens of a corpus on disk. Pickles as its path, so loader workers map the files instead of copying them."""

    folder: Path

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token numbers [N], uint16 or uint32, memory-mapped."""
        if self.meta["tokens"] == 0:
            return np.empty(0, dtype=self.meta["dtype"])
        return np.memmap(self.folder / "tokens.bin", dtype=self.meta["dtype"], mode="r")

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Return `dtype`, the number of `tokens`, and what `store_tokens` was told to keep."""
        return json.loads((self.folder / "meta.json").read_text())

    @cached_property
    def offsets(self) -> np.ndarray:
        """Starts of the documents and the end of the last one [D + 1], int64."""
        return np.load(self.folder / "offsets.npy")

    @cached_property
    def trained(self) -> np.ndarray | None:
        """Whether each token is trained on [N], memory-mapped; None: all are."""
        path = self.folder / "trained.bin"
        if not path.exists():
            return None
        return np.memmap(path, dtype=bool, mode="r") if self.meta["tokens"] else np.empty(0, dtype=bool)

    @cached_property
    def targets_before(self) -> np.ndarray:
        """How many tokens before each place are trained on [N + 1], int64: a difference counts those between two."""
        counts = np.zeros(self.meta["tokens"] + 1, dtype=np.int64)
        np.cumsum(np.ones(len(counts) - 1) if self.trained is None else self.trained, out=counts[1:])
        return counts

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
        """Targets of each document cut to `length` tokens [D]: those trained on, but the first."""
        starts, ends = self.offsets[:-1], self.offsets[1:]
        if self.trained is None:
            return np.maximum(np.minimum(ends - starts, length) - 1, 0)
        first = np.minimum(starts + 1, ends)
        return self.targets_before[np.minimum(ends, starts + length)] - self.targets_before[first]

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


def store_answers(corpus: Corpus, answers: Answers, *, key: str, vocabulary: int, cache: Path) -> TokenStore:
    """Tokenize a corpus of canonical rows, with what is trained on; see `store_tokens`."""

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
        (folder / "meta.json").write_text(json.dumps({"dtype": np.dtype(dtype).name, "tokens": written}))

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


class Blocks(Dataset[Sample]):
    """Packed language modelling: the token stream in blocks of one length.

    A sample: `input_ids`, `labels` (equal to them; the model shifts) and, when isolated, `position_ids`, each [T].
    length: T. isolate: keep documents apart (see above). keep_tail: also serve the last, partial block, padded with
    label -100: for validation, where no token may be lost; a training set drops it, so all its blocks weigh the same.
    pad: the token that fills it up.
    """

    def __init__(
        self, store: TokenStore, length: int, *, isolate: bool = True, keep_tail: bool = False, pad: int = 0
    ) -> None:
        self.store, self.length, self.isolate, self.pad = store, length, isolate, pad
        total = len(store.tokens)
        tail = keep_tail and total % length >= 2
        self.blocks = total // length + tail

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of {self.blocks}")
        ids = self._tokens(index).astype(np.int64)
        missing = (0, self.length - len(ids))
        # two arrays, never one shared: an edit of the inputs must not reach the labels
        labels = np.pad(ids, missing, constant_values=IGNORED)
        padded = np.pad(ids, missing, constant_values=self.pad)
        sample = {"input_ids": torch.from_numpy(padded), "labels": torch.from_numpy(labels)}
        if self.isolate:
            sample["position_ids"] = torch.from_numpy(self._position_ids(index))
        return sample

    @property
    def target_counts(self) -> np.ndarray:
        """Return how many tokens each sample predicts [len(self)]."""
        counts = np.full(self.blocks, self.length - 1, dtype=np.int64)
        if self.blocks:
            counts[-1] = len(self._tokens(self.blocks - 1)) - 1
        return counts

    def targets(self, index: int) -> np.ndarray:
        """The tokens that a sample predicts: all but its first."""
        return self._tokens(index)[1:]

    def _tokens(self, index: int) -> np.ndarray:
        return self.store.tokens[index * self.length : (index + 1) * self.length]

    def _position_ids(self, index: int) -> np.ndarray:
        """Positions [T] that restart where a document starts; a block that opens mid-document counts from 0."""
        start = index * self.length
        first, last = np.searchsorted(self.store.offsets, (start, start + self.length))
        starts = np.zeros(self.length, dtype=np.int64)
        inner = self.store.offsets[first:last] - start
        starts[inner] = inner
        return np.arange(self.length) - np.maximum.accumulate(starts)


class Documents(Dataset[Sample]):
    """One document a sample, cut to `length` tokens: language modelling without packing, or classification.

    A sample: `input_ids` [t] and `labels`, either equal to them [t] or, with `labels` given, the class [] as int64.
    Pair with `PadTokens` to form batches. Documents that have no target, within `length`, are left out of the former.
    group_by_length: ask the sampler for batches of alike lengths (see `GlobalBatches`).

    `token_counts` [N] are the tokens of each sample; `cut` is how many documents were longer than `length`,
    and `without_target` how many of those with answers are left out.
    """

    deterministic = True  # a sample is the same each time it is read

    def __init__(
        self, store: TokenStore, length: int, labels: Sequence[int] | None = None, *, group_by_length: bool = True
    ) -> None:
        self.store, self.length, self.group_by_length = store, length, group_by_length
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        whole = np.diff(store.offsets)
        lengths = np.minimum(whole, length)
        self.cut = int((whole > length).sum()) + store.meta.get("cut", 0)
        targets = store.target_counts(length)
        self.rows = np.flatnonzero(targets) if labels is None else np.arange(len(lengths))
        self.token_counts = lengths[self.rows]
        self._targets = targets[self.rows]
        self.without_target = 0 if store.trained is None else len(targets) - len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        ids = self.store.document(row, self.length).astype(np.int64)
        labels = torch.from_numpy(self.store.labels(row, self.length)) if self.labels is None else self.labels[row]
        return {"input_ids": torch.from_numpy(ids), "labels": labels}

    @property
    def target_counts(self) -> np.ndarray:
        """Return how many targets each sample has [len(self)], or that it has one class."""
        return self._targets if self.labels is None else np.ones(len(self), dtype=np.int64)

    def targets(self, index: int) -> np.ndarray:
        """The tokens that a sample predicts."""
        labels = self.store.labels(self.rows[index], self.length)[1:]
        return labels[labels != IGNORED]


@dataclass(frozen=True)
class PadTokens:
    """Form a batch from samples of different lengths, padded on the right to the longest.

    Gives `input_ids` [B, T], and `labels` [B, T] with -100 at padding or classes [B]. `attention_mask` [B, T] comes
    with classes only: a causal model cannot see right padding, and without a mask the faster attention kernels run.
    """

    pad: int

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        ids = [sample["input_ids"] for sample in samples]
        batch = {"input_ids": _padded(ids, self.pad)}
        if samples[0]["labels"].ndim:
            return {**batch, "labels": _padded([sample["labels"] for sample in samples], IGNORED)}
        mask = _padded([torch.ones_like(row) for row in ids], 0)
        return {**batch, "attention_mask": mask, "labels": torch.stack([sample["labels"] for sample in samples])}


def stack(samples: Sequence[Sample]) -> Sample:
    """Form a batch from samples of equal shapes."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
