"""Texts for masked language modelling: some tokens are hidden, and are what is predicted.

As BERT does it (Devlin et al., arXiv 1810.04805): of each sample a share of its tokens, at least one, chosen anew each
time it is read; of those, 80 % become the mask token, 10 % another token, 10 % stay. How many are chosen depends on the
sample alone, so what a batch weighs is known beforehand; which ones depends on (seed, epoch, sample) alone, where a
sampler seeds what it reads, and never on the number of ranks or on when a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .cache import digest
from .errors import TaskError
from .token_store import IGNORED, TokenStore, store_tokens
from .tokenizers import enclosing, encode_plain, tokenizer_key
from .tokens import Blocks, Documents, Sample

if TYPE_CHECKING:
    from ...recipes import Recipe
    from .corpora import Corpus

HIDDEN, REPLACED = 0.8, 0.9  # of what is chosen; up to there it becomes the mask, or any token
AT_ONCE = 1 << 14  # samples whose tokens are counted together


@dataclass(frozen=True)
class Masking:
    """How samples are masked.

    mask: the mask token. special: tokens that are never chosen. vocabulary: how many there are to draw from. share: of
    a sample's other tokens, above 0. fixed: a sample is masked alike each time, as an evaluation needs it.
    """

    mask: int
    special: Sequence[int]
    vocabulary: int
    share: float
    fixed: bool = False

    def __call__(self, ids: np.ndarray, index: int) -> Sample:
        """Tokens [t] of a sample as `input_ids`, and `labels`: what they were where they are chosen, else -100."""
        seed = index if self.fixed else int(torch.randint(2**62, ()))
        draw = np.random.default_rng(seed)
        able = np.flatnonzero(~np.isin(ids, self.special))
        chosen = draw.permutation(able)[: self.count(np.array(len(able)))]
        inputs, labels = ids.astype(np.int64), np.full(len(ids), IGNORED)
        labels[chosen] = inputs[chosen]
        fate = draw.random(len(chosen))
        others = draw.integers(self.vocabulary, size=len(chosen))
        inputs[chosen] = np.where(fate < HIDDEN, self.mask, np.where(fate < REPLACED, others, inputs[chosen]))
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def count(self, able: np.ndarray) -> np.ndarray:
        """How many are chosen of so many that may be [N]."""
        return np.minimum(np.maximum(np.rint(self.share * able), 1), able).astype(np.int64)

    def targets(self, store: TokenStore, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """How many tokens are chosen of each sample [N], which holds those of the store from a start to an end."""
        able = np.zeros(len(starts), dtype=np.int64)
        for first in range(0, len(starts), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            begin, end = starts[part][0], ends[part][-1]
            before = np.zeros(end - begin + 1, dtype=np.int64)
            np.cumsum(~np.isin(store.tokens[begin:end], self.special), out=before[1:])
            able[part] = before[ends[part] - begin] - before[starts[part] - begin]
        return self.count(able)


class MaskedBlocks(Blocks):
    """The token stream in blocks of one length, the last one of a validation set shorter; see `Blocks`.

    Documents of one block see each other, as in BERT's own training. Pair with `PadTokens` with a mask.
    """

    deterministic = False

    def __init__(self, store: TokenStore, length: int, masking: Masking, *, keep_tail: bool = False) -> None:
        super().__init__(store, length, isolate=False, keep_tail=keep_tail)
        self._masking = masking
        starts = np.arange(len(self)) * length
        ends = np.minimum(starts + length, len(store.tokens))
        self.token_counts, self._targets = ends - starts, masking.targets(store, starts, ends)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self._masking(self._tokens(index), index)

    @property
    def target_counts(self) -> np.ndarray:
        """Return how many tokens each sample predicts [len(self)]."""
        return self._targets


class MaskedDocuments(Documents):
    """One document a sample, cut to `length` tokens; see `Documents`. Pair with `PadTokens` with a mask."""

    deterministic = False

    def __init__(self, store: TokenStore, length: int, masking: Masking, *, group_by_length: bool = True) -> None:
        super().__init__(store, length, group_by_length=group_by_length)
        self._masking = masking
        starts = store.offsets[:-1][self.rows]
        self._targets = masking.targets(store, starts, starts + self.token_counts)

    def __getitem__(self, index: int) -> Sample:
        return self._masking(self.store.document(self.rows[index], self.length), index)


def check_plain(*corpora: Corpus | None) -> None:
    """Raise `TaskError` where rows are more than a text."""
    if any(corpus is not None and corpus.shaped for corpus in corpora):
        raise TaskError(
            "data.format: masked-lm is trained on texts, and these rows are chats or prompts with completions. Set "
            "data.format: plain and data.text_column."
        )


def masked_samples(
    recipe: Recipe, tokenizer: Any, cache: Path
) -> Callable[[Corpus, bool], MaskedBlocks | MaskedDocuments]:
    """What makes samples of a corpus. keep_tail: for validation, which is masked alike each time and loses no token."""
    data, frame = recipe.data, enclosing(tokenizer)
    key = digest([tokenizer_key(tokenizer), repr(frame), "special tokens as text"])
    encode = partial(encode_plain, tokenizer)

    def samples(corpus: Corpus, keep_tail: bool) -> MaskedBlocks | MaskedDocuments:
        special, size = tokenizer.all_special_ids, len(tokenizer)
        masking = Masking(tokenizer.mask_token_id, special, size, data.mask_share, fixed=keep_tail)
        store = store_tokens(corpus, encode, key=key, vocabulary=size, cache=cache, frame=frame)
        if data.pack:
            return MaskedBlocks(store, data.sequence_length, masking, keep_tail=keep_tail)
        return MaskedDocuments(store, data.sequence_length, masking, group_by_length=data.group_by_length)

    return samples
