"""The data of a task, from `data.source` to samples: held out, tokenized, packed or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import default_collate

from ...own_code import is_code
from .baselines import baselines
from .cache import digest
from .chats import Answers, with_template
from .corpora import Corpus, digits
from .custom import call_code
from .errors import TaskError
from .image_folder import image_folders
from .images import Images
from .labels import Kind, class_names, targets
from .masked_texts import MaskedBlocks, check_plain, masked_samples
from .mixture import AnyTexts, parts_of
from .packing import Packed, Texts
from .parts import Parts, joined, load_parts, sources_facts
from .rows import PIECE
from .split import split_indices
from .tagged import tagged_samples
from .token_store import store_answers, store_tokens
from .tokenizers import EncodeCut, encode_plain, framing, load_tokenizer, tokenizer_key, with_mask
from .tokens import Blocks, Documents, PadTokens, stack

if TYPE_CHECKING:
    from ...recipes import Recipe

CHARACTERS = 64  # of a token, at most and on average: what lies beyond is not read for a text that is cut


@dataclass(frozen=True)
class Prepared:
    """Data sets and what a model must know of them: the tokenizer, the classes' names, whether packing isolates."""

    train: Any = None
    validation: Any = None
    collate: Callable[..., Any] | None = None
    tokenizer: Any = None
    classes: Sequence[str] | None = None
    isolated: bool = False
    datamodule: pl.LightningDataModule | None = None
    unit: Literal["tokens", "samples"] = "samples"
    facts: dict[str, Any] = field(default_factory=dict)


def prepare(recipe: Recipe, cache: Path, own: Path | None = None) -> Prepared:
    """The data that a recipe names, in the form its task takes. own: the tokenizer that the run has kept."""
    source, kind = recipe.data.source, recipe.model.task
    if source is not None and is_code(source):
        return _own_data(recipe, source, cache, own)
    if source == "digits":
        return _digits(recipe)
    if kind == "image-classification":
        return _image_files(recipe, cache)
    make = _labelled_texts if kind in ("sequence-classification", "token-classification") else _language
    return make(recipe, cache, own)


def _language(recipe: Recipe, cache: Path, own: Path | None) -> Prepared:
    """Texts, and chats or prompts with their completions, of which some tokens are trained on."""
    data = recipe.data
    if data.sequence_length < 2:
        raise TaskError(f"data.sequence_length {data.sequence_length}: predicting a token takes one before it, so 2.")
    masked = recipe.model.task == "masked-lm"
    isolated = bool(data.args.get("pack_isolation", True)) and data.pack and not masked
    parts = load_parts(recipe, cache, labelled=False)
    shaped = {corpus.shaped for corpus in parts.train}
    if any(corpus.shaped not in shaped for corpus in parts.held):
        kinds = {True: "chats or prompts with completions", False: "texts"}
        held_kind = kinds[next(corpus.shaped for corpus in parts.held if corpus.shaped not in shaped)]
        raise TaskError(f"data.validation has {held_kind}, and data.source {kinds[shaped.pop()]}.")
    tokenizer = load_tokenizer(recipe.model, parts.whole, cache=cache, own=own)
    make: dict[bool, Callable[[Corpus, bool], Any]]
    if masked:
        check_plain(*parts.train, *parts.held)
        tokenizer = with_mask(tokenizer, recipe.model)
        make = {False: masked_samples(recipe, tokenizer, cache)}
    else:
        makers = {True: _answer_samples, False: _plain_samples}
        make = {kind: makers[kind](recipe, tokenizer, cache, isolated) for kind in shaped}
    sets = joined(parts, recipe, lambda corpus, keep: make[corpus.shaped](corpus, keep))
    _check_not_empty(*sets, data.sequence_length)
    facts = {**token_facts(*sets), "vocab_size": len(tokenizer), **text_facts(parts, recipe, *sets)}
    if True in shaped:
        trained = facts["trained_tokens"] = int(sets[0].target_counts.sum())
        documents = sum(len(getattr(part, "rows", ())) for part in parts_of(sets[0]))
        if data.train_on != "all" and False not in shaped and trained == facts["train_tokens"] - documents:
            raise TaskError(
                "data.source: all tokens are answers, none is asked. If that is meant, set data.train_on: all."
            )
    if sets[1] is not None and not masked:
        facts["baselines"] = baselines(sets[0], sets[1], len(tokenizer), cache)
    collate = stack if data.pack and not masked else PadTokens(tokenizer.pad_token_id, mask=masked)
    return Prepared(*sets, collate, tokenizer, isolated=isolated, unit="tokens", facts=facts)


def _plain_samples(recipe: Recipe, tokenizer: Any, cache: Path, isolated: bool) -> Callable[[Corpus, bool], Texts]:
    """What makes samples of texts, of which every token is trained on."""
    data, frame = recipe.data, framing(tokenizer, packed=recipe.data.pack)
    key = digest([tokenizer_key(tokenizer), repr(frame), "special tokens as text"])

    def encode(texts: list[str]) -> list[list[int]]:
        return encode_plain(tokenizer, texts)

    def samples(corpus: Corpus, keep_tail: bool) -> Blocks | Documents:
        store = store_tokens(corpus, encode, key=key, vocabulary=len(tokenizer), cache=cache, frame=frame)
        if data.pack:
            pad = tokenizer.pad_token_id
            return Blocks(store, data.sequence_length, isolate=isolated, keep_tail=keep_tail, pad=pad)
        return Documents(store, data.sequence_length, group_by_length=data.group_by_length)

    return samples


def _answer_samples(recipe: Recipe, tokenizer: Any, cache: Path, isolated: bool) -> Callable[[Corpus, bool], Texts]:
    """What makes samples of chats, and of prompts with their completions."""
    data = recipe.data
    with_template(tokenizer, data.chat_template)
    answers = Answers(tokenizer, data.train_on)
    key = digest([tokenizer_key(tokenizer), f"{tokenizer.chat_template} {data.train_on}"])

    def samples(corpus: Corpus, keep_tail: bool) -> Packed | Documents:
        store = store_answers(corpus, answers, key=key, vocabulary=len(tokenizer), cache=cache)
        if data.pack:
            return Packed(store, data.sequence_length, isolate=isolated, pad=tokenizer.pad_token_id)
        return Documents(store, data.sequence_length, group_by_length=data.group_by_length)

    return samples


def _labelled_texts(recipe: Recipe, cache: Path, own: Path | None) -> Prepared:
    data = recipe.data
    kind: Kind = "words" if recipe.model.task == "token-classification" else recipe.model.problem
    parts = load_parts(recipe, cache, labelled=True, kind=kind)
    tokenizer = load_tokenizer(recipe.model, parts.whole, cache=cache, own=own)
    known, held = ([label for corpus in some for label in corpus.labels or ()] for some in (parts.train, parts.held))
    places = {name: place for corpus in parts.held for name, place in corpus.places.items()}
    classes = class_names(kind, known, held, places)
    key = digest([tokenizer_key(tokenizer), f"classification {data.sequence_length}, special tokens as text"])

    def samples(corpus: Corpus, keep_tail: bool) -> Documents:
        encode = EncodeCut(tokenizer, data.sequence_length)
        store = store_tokens(
            corpus, encode, key=key, vocabulary=len(tokenizer), cache=cache,
            head=max(PIECE, CHARACTERS * data.sequence_length), about=lambda: {"cut": encode.cut},
        )  # fmt: skip
        labels = targets(kind, corpus.labels or (), classes)
        return Documents(store, data.sequence_length, labels, group_by_length=data.group_by_length)

    make = tagged_samples(recipe, tokenizer, cache, classes or ()) if kind == "words" else samples
    sets = joined(parts, recipe, make)
    facts = {**token_facts(*sets), "vocab_size": len(tokenizer), **text_facts(parts, recipe, *sets)}
    if classes is not None:
        facts["classes"] = classes
    collate = PadTokens(tokenizer.pad_token_id, mask=True)
    return Prepared(*sets, collate, tokenizer, classes=classes, facts=facts)


def _digits(recipe: Recipe) -> Prepared:
    images, labels = (part[: recipe.data.limit] for part in digits())
    fraction = recipe.data.validation
    if isinstance(fraction, str):
        raise TaskError(f"data.validation {fraction!r}: digits takes a fraction, such as 0.2.")
    rows, held = np.arange(len(labels)), np.arange(0)
    if fraction:
        groups = [digest([image.tobytes()]) for image in images]
        rows, held = split_indices(groups, labels.tolist(), fraction, len(labels))
    train = Images(images[rows], labels[rows])
    validation = Images(images[held], labels[held]) if len(held) else None
    names = [str(digit) for digit in range(10)]
    return Prepared(train, validation, stack, classes=names, facts={**sizes(train, validation), "classes": names})


def _image_files(recipe: Recipe, cache: Path) -> Prepared:
    train, held, classes = image_folders(recipe, cache)
    return Prepared(train, held, stack, classes=classes, facts={**sizes(train, held), "classes": classes})


def _own_data(recipe: Recipe, source: str, cache: Path, own: Path | None) -> Prepared:
    """A user's `module:attr`: a LightningDataModule, or (train, validation) with map-style data sets."""
    loaded = call_code(source, recipe.data.args, "data.source")
    named = isinstance(recipe.model.tokenizer or recipe.model.name, str)
    tokenizer = load_tokenizer(recipe.model, Corpus([], None, None, ""), cache=cache, own=own) if named else None
    unit: Literal["tokens", "samples"] = "tokens" if recipe.model.task in ("causal-lm", "masked-lm") else "samples"
    if isinstance(loaded, pl.LightningDataModule):
        return Prepared(tokenizer=tokenizer, datamodule=loaded, unit=unit)
    if not (isinstance(loaded, (tuple, list)) and len(loaded) == 2 and hasattr(loaded[0], "__getitem__")):
        raise TaskError(
            f"data.source: {source} gave a {type(loaded).__name__}; "
            "it must give a LightningDataModule or (train, validation) data sets."
        )
    train, validation = loaded
    labelled = "classification" in recipe.model.task and recipe.model.problem != "regression"
    classes = _classes_of(train) if labelled else None
    facts = {**sizes(train, validation), **({} if classes is None else {"classes": classes})}
    return Prepared(train, validation, _collate_of(train, tokenizer), tokenizer, classes, unit=unit, facts=facts)


def _classes_of(train: Any) -> list[str]:
    """Class names that a data set declares (`classes`, as torchvision does), else the labels of all its samples."""
    declared = getattr(train, "classes", None)
    if declared is not None:
        return [str(name) for name in declared]
    if getattr(train[0]["labels"], "ndim", 0):  # one 0 or 1 for each
        return [str(number) for number in range(len(train[0]["labels"]))]
    return [str(number) for number in range(max(int(train[i]["labels"]) for i in range(len(train))) + 1)]


def _collate_of(train: Any, tokenizer: Any) -> Callable[..., Any]:
    sample = train[0]
    if not isinstance(sample, dict):
        return default_collate
    if "position_ids" in sample or "input_ids" not in sample:
        return stack
    return PadTokens(0 if tokenizer is None else tokenizer.pad_token_id)  # padding is masked: its number is not seen


def _check_not_empty(train: AnyTexts, validation: AnyTexts | None, length: int) -> None:
    for name, data in (("training", train), ("validation", validation)):
        for part in () if data is None else parts_of(data):
            if len(part) == 0:
                raise TaskError(
                    f"data.sequence_length {length}: the {name} data has {len(part.store.tokens)} tokens, not one "
                    "sample. Shorten it, or give more data."
                )


def token_facts(train: AnyTexts, validation: AnyTexts | None) -> dict[str, Any]:
    """How many samples there are, and how many tokens all of them have."""
    facts = {**sizes(train, validation), "train_tokens": _tokens(train)}
    return facts if validation is None else {**facts, "validation_tokens": _tokens(validation)}


def _tokens(data: AnyTexts) -> int:
    """Of all samples together."""
    return sum(
        int(part.target_counts.sum()) + len(part)
        if isinstance(part, Blocks) and not isinstance(part, MaskedBlocks)
        else int(part.token_counts.sum())
        for part in parts_of(data)
    )


def text_facts(parts: Parts, recipe: Recipe, *sets: Any) -> dict[str, Any]:
    """What the texts are, what of them is not trained on, if any, and how sources are mixed."""
    each = [part for data in sets if data is not None for part in parts_of(data)]
    counts = {
        "rows_cut": sum(part.cut for part in each if not isinstance(part, Blocks)),
        "rows_without_target": sum(part.without_target for part in each if not isinstance(part, Blocks)),
    }
    left_out = {name: count for name, count in counts.items() if count}
    return {**parts.facts, **left_out, **sources_facts(parts, sets[0] or each[0], recipe)}


def sizes(train: Any, validation: Any) -> dict[str, Any]:
    """How many samples there are."""
    sizes = {"train_samples": len(train)}
    return sizes if validation is None else {**sizes, "validation_samples": len(validation)}
