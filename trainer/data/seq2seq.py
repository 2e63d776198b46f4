"""Prompts with completions as sources and targets, for models that read the one and write the other.

A source is tokenized as the model's tokenizer does it, a target as it does text targets; both end with its end-of-text
token, which is a target, too. A row of the store is a source followed by its target, of which the target is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...own_code import is_code
from .cache import digest
from .carried import resolve_name
from .chats import Tokens
from .corpora import Corpus
from .errors import BadRow
from .parts import joined, load_parts
from .paths import model_folder
from .prepare import Prepared, prepare, text_facts, token_facts
from .rows import Place
from .shapes import SHAPES, Shape
from .token_store import IGNORED, store_answers
from .tokenizers import load_tokenizer, tokenizer_key, with_end
from .tokens import Documents, PadTokens, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...recipes import Recipe


# -- rows --------------------------------------------------------------------------------------------------------------
def pair_of(place: Place | str, row: Mapping[str, Any]) -> dict[str, str]:
    """A canonical row as `prompt` and `completion`; raises `BadRow` for a chat of more than one exchange."""
    if "completion" in row:
        return {"prompt": row["prompt"], "completion": row["completion"]}
    first, *rest = row["messages"]
    before = [first] if first["role"] in ("system", "developer") else []
    exchange = rest if before else row["messages"]
    calls = any(message.get("tool_calls") for message in exchange)
    if row.get("tools") or calls or [message["role"] for message in exchange] != ["user", "assistant"]:
        what = "has tools" if row.get("tools") or calls else f"is a chat of {len(exchange)} messages"
        raise BadRow(
            f"data.source: {place} {what}; seq2seq takes one message of the user and the answer to it. Chats are "
            "learnt by model.task: causal-lm.",
            "no single exchange",
        )
    if not exchange[1]["content"].strip():
        raise BadRow(f"data.source: {place} has an empty answer, so nothing to train on.", "empty answer")
    prompt = "\n\n".join(message["content"] for message in (*before, exchange[0]))
    return {"prompt": prompt, "completion": exchange[1]["content"]}


def _paired(shape: Shape) -> Shape:
    return replace(shape, read=lambda place, row: pair_of(place, shape.read(place, row)))


PAIRS = {name: _paired(shape) for name, shape in SHAPES.items()}


# -- tokens ------------------------------------------------------------------------------------------------------------
class _EncodePairs:
    """Canonical rows as sources with their targets, each at most `length` tokens; counts the rows it has `cut`.

    What is cut keeps its end-of-text token, as transformers cuts. A text that spells a special token is text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.cut = 0

    def __call__(self, rows: list[str]) -> list[Tokens]:
        pairs = [pair_of("a row", json.loads(row)) for row in rows]
        sources, longer = self._encoded(text=[pair["prompt"] for pair in pairs])
        targets, longer_too = self._encoded(text_target=[pair["completion"] for pair in pairs])
        self.cut += sum(either or other for either, other in zip(longer, longer_too, strict=True))
        return [
            Tokens([*source, *target], [False] * len(source) + [True] * len(target))
            for source, target in zip(sources, targets, strict=True)
        ]

    def _encoded(self, **texts: Any) -> tuple[list[list[int]], list[bool]]:
        """Token numbers, and of each text whether it is longer."""
        encoded = self.tokenizer(**texts, truncation=True, max_length=self.length, split_special_tokens=True)
        ids = encoded["input_ids"]
        if encoded.encodings is None:
            return ids, [False] * len(ids)
        return ids, [bool(encoding.overflowing) for encoding in encoded.encodings]


class SourceTargets(Documents):
    """Sources with their targets. A sample: `input_ids` [t], and `labels` [u], every one of which is a target.

    `token_counts` [N] are the tokens of both. Pair with `PadPairs`.
    """

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        ids, labels = self.store.document(row).astype(np.int64), self.store.labels(row)
        begins = int((labels != IGNORED).argmax())
        return {"input_ids": torch.from_numpy(ids[:begins]), "labels": torch.from_numpy(labels[begins:])}


@dataclass(frozen=True)
class PadPairs:
    """Form a batch of sources and targets, each padded on the right to its own longest.

    Gives `input_ids` and `attention_mask` [B, T], `labels` [B, U] with -100 at padding, and `decoder_input_ids` [B, U]:
    the labels one place later. start: what comes before the first of them; None: the last one, as mBART has it.
    """

    pad: int
    start: int | None

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        shifted = [{**sample, "labels": self._shifted(sample["labels"])} for sample in samples]
        before = PadTokens(self.pad)(shifted)["labels"]
        return {
            **PadTokens(self.pad, mask=True)(samples),
            "decoder_input_ids": before.masked_fill(before < 0, self.pad),
        }

    def _shifted(self, labels: torch.Tensor) -> torch.Tensor:
        first = labels[-1:] if self.start is None else labels.new_tensor([self.start])
        return torch.cat([first, labels[:-1]])


def decoder_start(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The token that a model's decoder begins with: what the model says, or padding for one from `model.config`."""
    if model.name is None:
        padding = None if tokenizer is None else tokenizer.pad_token_id
        start: int | None = (model.config or {}).get("decoder_start_token_id", padding)
        return start
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder(resolve_name(model.name), "model.name"))
    return getattr(config, "decoder_start_token_id", None)


# -- all of it ---------------------------------------------------------------------------------------------------------
def prepare_pairs(recipe: Recipe, cache: Path, own: Path | None = None) -> Prepared:
    """The sources and targets that a recipe names. own: the tokenizer that the run has kept. Raises `TaskError`."""
    data = recipe.data
    if data.source is not None and is_code(data.source):
        given = prepare(recipe, cache, own)
        collate = None if given.train is None else _padding(recipe, given.tokenizer)
        return replace(given, collate=collate, unit="tokens")
    parts = load_parts(recipe, cache, labelled=False, only=PAIRS)
    tokenizer = with_end(load_tokenizer(recipe.model, parts.whole, cache=cache, own=own))
    length, key = data.sequence_length, digest([tokenizer_key(tokenizer), f"pairs {data.sequence_length}"])

    def samples(corpus: Corpus, keep_tail: bool) -> SourceTargets:
        encode = _EncodePairs(tokenizer, length)
        store = store_answers(
            corpus, encode, key=key, vocabulary=len(tokenizer), cache=cache, about=lambda: {"cut": encode.cut}
        )
        return SourceTargets(store, 2 * length, group_by_length=data.group_by_length)

    sets = joined(parts, recipe, samples)
    facts = {**token_facts(*sets), "vocab_size": len(tokenizer), **text_facts(parts, recipe, *sets)}
    facts["trained_tokens"] = int(sets[0].target_counts.sum())
    return Prepared(*sets, _padding(recipe, tokenizer), tokenizer, unit="tokens", facts=facts)


def _padding(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> PadPairs:
    return PadPairs(0 if tokenizer is None else tokenizer.pad_token_id, decoder_start(recipe.model, tokenizer))
