"""Texts as samples: `Blocks` cuts the stream of a token store into blocks of one length (packing), `Documents` gives
one document a sample, and `packing.Packed` fills samples with whole documents.

**How packed documents are kept apart.** Every document opens with a separator token. `position_ids` restart at each
separator, from which transformers builds a block-diagonal causal mask, so no document attends to another. The only
target that crosses a border is the separator itself, predicted from the document that ends there: that is what
"the document ends here" means, so no label is masked and every block has exactly `length - 1` targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from .token_store import IGNORED, TokenStore

Sample = dict[str, torch.Tensor]


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

    A sample: `input_ids` [t] and `labels`, either equal to them [t] or, with `labels` [N, ...] given, its row of
    those: a class [], say.
    Pair with `PadTokens` to form batches. Documents that have no target, within `length`, are left out of the former.
    group_by_length: ask the sampler for batches of alike lengths (see `GlobalBatches`).

    `token_counts` [N] are the tokens of each sample; `cut` is how many documents were longer than `length`,
    and `without_target` how many of those with answers are left out.
    """

    deterministic = True  # a sample is the same each time it is read

    def __init__(
        self,
        store: TokenStore,
        length: int,
        labels: torch.Tensor | Sequence[int] | None = None,
        *,
        group_by_length: bool = True,
    ) -> None:
        self.store, self.length, self.group_by_length = store, length, group_by_length
        self.labels = None if labels is None else torch.as_tensor(labels)
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
        """Return how many targets each sample has [len(self)]; 1 where its label is its row's."""
        return self._targets if self.labels is None else np.ones(len(self), dtype=np.int64)

    def targets(self, index: int) -> np.ndarray:
        """The tokens that a sample predicts."""
        labels = self.store.labels(self.rows[index], self.length)[1:]
        return labels[labels != IGNORED]


@dataclass(frozen=True)
class PadTokens:
    """Form a batch from samples of different lengths, padded on the right to the longest.

    Gives `input_ids` [B, T], and `labels`: [B, T] with -100 at padding where they are tokens', else one a row [B, ...].
    `attention_mask` [B, T] comes with the latter, or where it is asked for: a causal model cannot see right padding,
    and without a mask the faster attention kernels run.
    """

    pad: int
    mask: bool = False

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        ids = [sample["input_ids"] for sample in samples]
        labels, batch = [sample["labels"] for sample in samples], {"input_ids": _padded(ids, self.pad)}
        of_tokens = labels[0].ndim == 1 and not labels[0].is_floating_point()  # several classes of a row are 0. and 1.
        if self.mask or not of_tokens:
            batch["attention_mask"] = _padded([torch.ones_like(row) for row in ids], 0)
        return {**batch, "labels": _padded(labels, IGNORED) if of_tokens else torch.stack(labels)}


def stack(samples: Sequence[Sample]) -> Sample:
    """Form a batch from samples of equal shapes."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
