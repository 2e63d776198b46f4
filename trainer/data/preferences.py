"""Preferences as samples: two answers to one prompt, or an answer and whether it is wanted.

Tokens of both are in one store (see `token_store`): of sample i, document 2i is the chosen answer after its prompt, and
2i + 1 the rejected one; or the answer itself, and the prompt with the answer to another one, from which KTO estimates
how far the model has moved. Prompts are context: answers, and their ends, are what is weighed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from .cache import digest
from .chats import Answers, Tokens, with_template
from .corpora import Corpus
from .errors import TaskError
from .parts import load_parts
from .preference_shapes import PREFERENCES, Said, answers_of, exchange
from .prepare import Prepared, sizes, text_facts
from .token_store import IGNORED, TokenStore, store_answers
from .tokenizers import load_tokenizer, tokenizer_key
from .tokens import Sample

if TYPE_CHECKING:
    from ...recipes import Recipe

TASKS = ("preference", "reward-model")


class Preferences(Dataset[Sample]):
    """Two documents a sample, each cut to `length` tokens.

    A sample of pairs: `input_ids` and `labels`, each [2, T], chosen first, and `attention_mask` [2, T], 0 where the
    shorter one is padded. A sample of single answers: those of the answer alone, [T], `wanted` [] and `index` [].
    Labels are `IGNORED` but at the tokens of answers. Either has `reference` [] or [2] once `reference` is set. A
    sample of which a document has no answer within `length` is left out.

    Args:
        wanted: Of single answers [N], whether each is; None: pairs.
        full_targets: Whether a loss counts the tokens of chosen documents, too; `target_counts` then are those.
        pad: The token that fills up the shorter document.

    Attributes:
        token_counts: Tokens of each sample [len(self)].
        reference: Log-probabilities of both documents of each sample under the reference [len(self), 2].
        cut: How many samples have a document longer than `length`.
        without_target: How many samples are left out.
    """

    deterministic = True  # a sample is the same each time it is read

    def __init__(
        self, store: TokenStore, length: int, *, wanted: Sequence[bool] | None = None, pad: int = 0,
        group_by_length: bool = True, full_targets: bool = False,
    ) -> None:  # fmt: skip
        self.store, self.length, self.pad, self.group_by_length = store, length, pad, group_by_length
        whole = np.diff(store.offsets)
        lengths, targets = np.minimum(whole, length).reshape(-1, 2), store.target_counts(length).reshape(-1, 2)
        self.rows = np.flatnonzero(targets.all(1))
        self.without_target = len(targets) - len(self.rows)
        self.wanted = None if wanted is None else torch.tensor(wanted)[self.rows]
        shown = slice(None) if wanted is None else slice(1)
        self.cut = int((whole.reshape(-1, 2)[self.rows, shown] > length).any(1).sum())
        self.token_counts = lengths[self.rows, shown].sum(1)
        self.trained_tokens = int(targets[self.rows, shown].sum())
        if full_targets:
            self.target_counts = lengths[self.rows, 0] - 1
        self.reference: torch.Tensor | None = None

    @property
    def row_count(self) -> int:
        """Rows that are learnt from, a pair or an answer each."""
        return len(self)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if self.wanted is None:
            sample = pad_together([self.document(index, 0), self.document(index, 1)], self.pad)
            reference = None if self.reference is None else self.reference[index]
        else:
            sample = {**self.document(index, 0), "wanted": self.wanted[index], "index": torch.tensor(index)}
            reference = None if self.reference is None else self.reference[index, 0]
        return sample if reference is None else {**sample, "reference": reference}

    def document(self, index: int, which: int) -> Sample:
        """The first or the second document of a sample: `input_ids`, `labels` and `attention_mask` [t]."""
        row = 2 * self.rows[index] + which
        ids = self.store.document(row, self.length).astype(np.int64)
        labels = self.store.labels(row, self.length)
        tensors = torch.from_numpy(ids), torch.from_numpy(labels)
        return {"input_ids": tensors[0], "labels": tensors[1], "attention_mask": torch.ones_like(tensors[0])}


FILL = {"labels": IGNORED, "attention_mask": 0}


def pad_together(samples: Sequence[Sample], pad: int) -> Sample:
    """A batch of samples; what has a length is padded on the right to the longest: [..., t] -> [B, ..., T]."""

    def padded(name: str) -> torch.Tensor:
        rows = [sample[name] for sample in samples]
        if name not in ("input_ids", *FILL):
            return torch.stack(rows)
        longest, fill = max(row.shape[-1] for row in rows), FILL.get(name, pad)
        return torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[-1]), value=fill) for row in rows])

    return {name: padded(name) for name in samples[0]}


class PadPreferences:
    """Form a batch from samples of `Preferences`, by `pad_together`."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        return pad_together(samples, self.pad)


class _Two:
    """Canonical rows as tokens, two documents each: a pair, or each answer and a mismatched one.

    Args:
        before: The answers of the row before the first one.
    """

    def __init__(self, answers: Answers, pairs: bool, before: list[Said]) -> None:
        self.answers, self.pairs, self.before = answers, pairs, before

    def __call__(self, rows: list[str]) -> list[Tokens]:
        documents = [document for row in rows for document in self._documents(json.loads(row))]
        return self.answers([json.dumps(document, ensure_ascii=False) for document in documents])

    def _documents(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        said = [answer for answer, _ in answers_of(row)]
        for number, answer in enumerate(said):
            yield exchange(row, answer)
            if not self.pairs:
                other = self.before[min(number, len(self.before) - 1)]
                if isinstance(other, str) != isinstance(answer, str):
                    raise TaskError("data.source: some answers are texts, and others lists of messages.")
                yield exchange(row, other)
        self.before = said


def prepare_preferences(recipe: Recipe, cache: Path, own: Path | None = None) -> Prepared:
    """The preferences that a recipe names. own: the tokenizer that the run has kept. Raises `TaskError`."""
    data, section = recipe.data, recipe.model.preferences
    pairs = section.kind.pairs or recipe.model.task == "reward-model"
    parts = load_parts(recipe, cache, labelled=False, only=PREFERENCES, group=_prompt)
    for corpus in (*parts.train, *parts.held):
        _check_pairs(corpus, recipe, pairs)
    tokenizer = with_template(load_tokenizer(recipe.model, parts.whole, cache=cache, own=own), data.chat_template)
    answers = Answers(tokenizer, "last" if data.train_on == "last" else "answers")
    key = digest([tokenizer_key(tokenizer), f"{tokenizer.chat_template} {data.train_on} {pairs} preferences"])

    def samples(corpus: Corpus) -> Preferences:
        before = [answer for answer, _ in answers_of(json.loads(corpus.texts[len(corpus.texts) - 1]))]
        store = store_answers(corpus, _Two(answers, pairs, before), key=key, vocabulary=len(tokenizer), cache=cache)
        wanted = None if pairs else [label for text in corpus.texts for _, label in answers_of(json.loads(text))]
        made = Preferences(
            store, data.sequence_length, wanted=wanted, pad=tokenizer.pad_token_id,
            group_by_length=data.group_by_length,
            full_targets=recipe.model.task == "preference" and section.loss == "orpo",
        )  # fmt: skip
        if not len(made):
            raise TaskError(
                f"data.sequence_length {data.sequence_length}: no row has an answer within so many tokens. Raise it, "
                "or shorten the prompts."
            )
        return made

    sets = samples(parts.train[0]), samples(parts.held[0]) if parts.held else None
    facts = {
        **sizes(*sets), "vocab_size": len(tokenizer), "train_tokens": int(sets[0].token_counts.sum()),
        "trained_tokens": sets[0].trained_tokens, **text_facts(parts, recipe, *sets),
    }  # fmt: skip
    if sets[1] is not None:
        facts["validation_tokens"] = int(sets[1].token_counts.sum())
    unit: Literal["tokens", "samples"] = "tokens" if recipe.model.task == "preference" else "samples"
    return Prepared(*sets, PadPreferences(tokenizer.pad_token_id), tokenizer, unit=unit, facts=facts)


def _prompt(text: str) -> str:
    """What a row is held out by: no prompt is on both sides."""
    return json.dumps(json.loads(text)["prompt"], sort_keys=True)


def _check_pairs(corpus: Corpus, recipe: Recipe, pairs: bool) -> None:
    """Single answers teach KTO alone."""
    if pairs and "completion" in json.loads(corpus.texts[0]):
        wanted = recipe.model.task if recipe.model.task == "reward-model" else f"loss {recipe.model.preferences.loss}"
        raise TaskError(
            f"data.source: rows are single answers, each with a label, and {wanted} takes pairs: chosen and rejected. "
            "Set model: {task: preference, preference: {loss: kto}} to learn from them."
        )
