"""Words with a class each, as samples of tokens: the first token of a word has its class, all others have none."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .cache import digest
from .errors import TaskError
from .token_store import IGNORED, TokenStore, store_tokens
from .tokenizers import EncodeCut, tokenizer_key
from .tokens import Documents, Sample

if TYPE_CHECKING:
    from ...recipes import Recipe
    from .corpora import Corpus

CHARACTERS = 64  # of a token, at most and on average: what lies beyond is not read


class Tagged(Documents):
    """Rows of words. A sample: `input_ids` [t] and `labels` [t], -100 but at the first token of each word.

    places: beside each token, the number of the word (from 1) that it is the first of, or 0. tags: the classes of each
    row's words. `labels` are those of all words, one row after another. Pair with `PadTokens` with a mask.
    """

    def __init__(
        self, store: TokenStore, places: TokenStore, length: int, tags: Sequence[np.ndarray], *, group_by_length: bool
    ) -> None:
        super().__init__(store, length, torch.zeros(len(tags)), group_by_length=group_by_length)
        self.labels = torch.from_numpy(np.concatenate(tags))
        self._places, self._starts = places, np.cumsum([0, *map(len, tags)])
        self._words = np.array([np.count_nonzero(places.document(row)) for row in range(len(tags))])

    def __getitem__(self, index: int) -> Sample:
        ids = self.store.document(index, self.length).astype(np.int64)
        words = self._places.document(index, self.length).astype(np.int64)
        assert self.labels is not None
        tags = self.labels[self._starts[index] : self._starts[index + 1]].numpy()
        labels = np.where(words > 0, tags[words - 1], IGNORED)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    @property
    def target_counts(self) -> np.ndarray:
        """Return how many words of each sample are within its length [len(self)]."""
        return self._words


def tagged_samples(
    recipe: Recipe, tokenizer: Any, cache: Path, classes: Sequence[str]
) -> Callable[[Corpus, bool], Tagged]:
    """What makes samples of a corpus of words; see `shapes.words_of`. Raises `TaskError` for a slow tokenizer."""
    data, length = recipe.data, recipe.data.sequence_length
    if not tokenizer.is_fast:
        raise TaskError(f"the tokenizer {tokenizer.name_or_path!r} cannot tell which characters a token stands for.")
    numbers, key = {name: number for number, name in enumerate(classes)}, tokenizer_key(tokenizer)
    settings: dict[str, Any] = {"cache": cache, "head": max(1 << 16, CHARACTERS * length)}

    def samples(corpus: Corpus, keep_tail: bool) -> Tagged:
        encode = EncodeCut(tokenizer, length)
        store = store_tokens(
            corpus, encode, key=digest([key, f"words {length}"]), vocabulary=len(tokenizer),
            about=lambda: {"cut": encode.cut}, **settings,
        )  # fmt: skip
        places = store_tokens(
            corpus, lambda texts: _places(tokenizer, length, texts), key=digest([key, f"places of words {length}"]),
            vocabulary=length, **settings,
        )  # fmt: skip
        tags = [np.array([numbers[name] for name in json.loads(label)]) for label in corpus.labels or ()]
        return Tagged(store, places, length, tags, group_by_length=data.group_by_length)

    return samples


def _places(tokenizer: Any, length: int, texts: list[str]) -> list[list[int]]:
    """Beside each token of a text, the number of the word (from 1) that it is the first of, or 0."""
    given = {"truncation": True, "max_length": length, "split_special_tokens": True, "return_offsets_mapping": True}
    rows = []
    for text, spans in zip(texts, tokenizer(texts, **given)["offset_mapping"], strict=True):
        starts = list(accumulate((len(word) + 1 for word in text.split(" ")), initial=0))[:-1]
        row, last = [], 0
        for begin, end in spans:
            word = bisect_right(starts, end - 1) if end > begin else 0  # none: a token that was added
            row.append(word if word > last else 0)
            last = max(last, word)
        rows.append(row)
    return rows
