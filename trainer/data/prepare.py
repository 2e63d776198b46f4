"""The data of a task, from `data.source` to samples: held out, tokenized, packed or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from .packing import Packed, Texts
from .rows import PIECE
from .sources import load_corpus
from .split import balance, split, split_indices
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
    if is_code(source):
        return _own_data(recipe, cache, own)
    if source == "digits":
        return _digits(recipe)
    if kind == "image-classification":
        return _image_files(recipe, cache)
    make = _labelled_texts if kind in ("sequence-classification", "token-classification") else _language
    return make(recipe, cache, own)


def _language(recipe: Recipe, cache: Path, own: Path | None) -> Prepared:
    data = recipe.data
    if data.sequence_length < 2:
        raise TaskError(f"data.sequence_length {data.sequence_length}: predicting a token takes one before it, so 2.")
    args = dict(data.args or {})
    isolated = bool(args.pop("pack_isolation", True)) and data.pack and recipe.model.task != "masked-lm"
    train, held = _corpora(data, args, cache, labelled=False)
    tokenizer = load_tokenizer(recipe.model, train, cache=cache, own=own)
    if masked := recipe.model.task == "masked-lm":
        check_plain(train, held)
        tokenizer = with_mask(tokenizer, recipe.model)
    if train.shaped:
        return _answers(recipe, cache, train, held, tokenizer, isolated)
    frame = framing(tokenizer, packed=data.pack)

    def encode(texts: list[str]) -> list[list[int]]:
        return encode_plain(tokenizer, texts)

    def samples(corpus: Corpus, keep_tail: bool) -> Blocks | Documents:
        key = digest([tokenizer_key(tokenizer), repr(frame), "special tokens as text"])
        store = store_tokens(corpus, encode, key=key, vocabulary=len(tokenizer), cache=cache, frame=frame)
        if data.pack:
            pad = tokenizer.pad_token_id
            return Blocks(store, data.sequence_length, isolate=isolated, keep_tail=keep_tail, pad=pad)
        return Documents(store, data.sequence_length, group_by_length=data.group_by_length)

    make = masked_samples(recipe, tokenizer, cache) if masked else samples
    sets: tuple[Any, Any] = make(train, False), None if held is None else make(held, True)
    _check_not_empty(sets[0], sets[1], data.sequence_length)
    facts = {**_token_facts(*sets), "vocab_size": len(tokenizer), **_told(train, held, *sets)}
    if sets[1] is not None and not masked:
        facts["baselines"] = baselines(sets[0], sets[1], len(tokenizer), cache)
    collate = stack if data.pack and not masked else PadTokens(tokenizer.pad_token_id, mask=masked)
    return Prepared(*sets, collate, tokenizer, isolated=isolated, unit="tokens", facts=facts)


def _answers(
    recipe: Recipe, cache: Path, train: Corpus, held: Corpus | None, tokenizer: Any, isolated: bool
) -> Prepared:
    """Chats, and prompts with their completions: some of their tokens are trained on."""
    data = recipe.data
    if held is not None and not held.shaped:
        raise TaskError("data.validation has texts, and data.source chats or prompts with completions.")
    with_template(tokenizer, data.chat_template)
    answers = Answers(tokenizer, data.train_on)
    key = digest([tokenizer_key(tokenizer), f"{tokenizer.chat_template} {data.train_on}"])

    def samples(corpus: Corpus) -> Packed | Documents:
        store = store_answers(corpus, answers, key=key, vocabulary=len(tokenizer), cache=cache)
        if data.pack:
            return Packed(store, data.sequence_length, isolate=isolated, pad=tokenizer.pad_token_id)
        return Documents(store, data.sequence_length, group_by_length=data.group_by_length)

    sets = samples(train), None if held is None else samples(held)
    _check_not_empty(*sets, data.sequence_length)
    facts = {**_token_facts(*sets), "vocab_size": len(tokenizer), **_told(train, held, *sets)}
    trained = facts["trained_tokens"] = int(sets[0].target_counts.sum())
    if data.train_on != "all" and trained == facts["train_tokens"] - len(sets[0].rows):
        raise TaskError("data.source: all tokens are answers, none is asked. If that is meant, set data.train_on: all.")
    if sets[1] is not None:
        facts["baselines"] = baselines(sets[0], sets[1], len(tokenizer), cache)
    collate = stack if data.pack else PadTokens(tokenizer.pad_token_id)
    return Prepared(*sets, collate, tokenizer, isolated=isolated, unit="tokens", facts=facts)


def _labelled_texts(recipe: Recipe, cache: Path, own: Path | None) -> Prepared:
    data = recipe.data
    kind: Kind = "words" if recipe.model.task == "token-classification" else recipe.model.problem
    train, held = _corpora(data, dict(data.args or {}), cache, labelled=True, kind=kind)
    if data.source == "python-packages":
        train, held = balance(train), None if held is None else balance(held)
    tokenizer = load_tokenizer(recipe.model, train, cache=cache, own=own)
    classes = class_names(kind, train.labels or (), (held and held.labels) or ())
    key = digest([tokenizer_key(tokenizer), f"classification {data.sequence_length}, special tokens as text"])

    def samples(corpus: Corpus) -> Documents:
        encode = EncodeCut(tokenizer, data.sequence_length)
        store = store_tokens(
            corpus, encode, key=key, vocabulary=len(tokenizer), cache=cache,
            head=max(PIECE, CHARACTERS * data.sequence_length), about=lambda: {"cut": encode.cut},
        )  # fmt: skip
        labels = targets(kind, corpus.labels or (), classes)
        return Documents(store, data.sequence_length, labels, group_by_length=data.group_by_length)

    make = tagged_samples(recipe, tokenizer, cache, classes or ()) if kind == "words" else samples
    sets = make(train), None if held is None else make(held)
    facts = {**_token_facts(*sets), "vocab_size": len(tokenizer), **_told(train, held, *sets)}
    if classes is not None:
        facts["classes"] = classes
    collate = PadTokens(tokenizer.pad_token_id, mask=True)
    return Prepared(*sets, collate, tokenizer, classes=classes, facts=facts)


def _digits(recipe: Recipe) -> Prepared:
    images, labels = (part[: recipe.data.limit] for part in digits())
    fraction = recipe.data.validation
    if isinstance(fraction, str):
        raise TaskError(f"data.validation {fraction!r}: digits takes a fraction, such as 0.2.")
    rows: list[int] = list(range(len(labels)))
    held: list[int] = []
    if fraction:
        rows, held = split_indices([digest([image.tobytes()]) for image in images], labels.tolist(), fraction)
    train = Images(images[rows], labels[rows])
    validation = Images(images[held], labels[held]) if held else None
    names = [str(digit) for digit in range(10)]
    return Prepared(train, validation, stack, classes=names, facts={**_sizes(train, validation), "classes": names})


def _image_files(recipe: Recipe, cache: Path) -> Prepared:
    train, held, classes = image_folders(recipe, cache)
    return Prepared(train, held, stack, classes=classes, facts={**_sizes(train, held), "classes": classes})


def _own_data(recipe: Recipe, cache: Path, own: Path | None) -> Prepared:
    """A user's `module:attr`: a LightningDataModule, or (train, validation) with map-style data sets."""
    loaded = call_code(recipe.data.source, recipe.data.args, "data.source")
    named = isinstance(recipe.model.tokenizer or recipe.model.name, str)
    tokenizer = load_tokenizer(recipe.model, Corpus([], None, None, ""), cache=cache, own=own) if named else None
    unit: Literal["tokens", "samples"] = "tokens" if recipe.model.task in ("causal-lm", "masked-lm") else "samples"
    if isinstance(loaded, pl.LightningDataModule):
        return Prepared(tokenizer=tokenizer, datamodule=loaded, unit=unit)
    if not (isinstance(loaded, (tuple, list)) and len(loaded) == 2 and hasattr(loaded[0], "__getitem__")):
        raise TaskError(
            f"data.source: {recipe.data.source} gave a {type(loaded).__name__}; "
            "it must give a LightningDataModule or (train, validation) data sets."
        )
    train, validation = loaded
    labelled = "classification" in recipe.model.task and recipe.model.problem != "regression"
    classes = _classes_of(train) if labelled else None
    facts = {**_sizes(train, validation), **({} if classes is None else {"classes": classes})}
    return Prepared(train, validation, _collate_of(train, tokenizer), tokenizer, classes, unit=unit, facts=facts)


def _corpora(
    data: Any, args: dict[str, Any], cache: Path, *, labelled: bool, kind: Kind = "single-label"
) -> tuple[Corpus, Corpus | None]:
    corpus = load_corpus(data, data.source, args, cache=cache, labelled=labelled, kind=kind)
    if isinstance(data.validation, str):
        key = "data.validation"
        return corpus, load_corpus(data, data.validation, args, cache=cache, labelled=labelled, key=key, kind=kind)
    return split(corpus, data.validation, by_label=kind == "single-label") if data.validation else (corpus, None)


def _digest(train: Corpus, held: Corpus | None) -> str:
    """Equal exactly when training and held-out texts are."""
    return digest([train.fingerprint, "" if held is None else held.fingerprint])


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


def _check_not_empty(train: Texts, validation: Texts | None, length: int) -> None:
    for name, part in (("training", train), ("validation", validation)):
        if part is not None and len(part) == 0:
            raise TaskError(
                f"data.sequence_length {length}: the {name} data has {len(part.store.tokens)} tokens, not one sample. "
                "Shorten it, or give more data."
            )


def _token_facts(train: Texts, validation: Texts | None) -> dict[str, Any]:
    facts = {**_sizes(train, validation), "train_tokens": _tokens(train)}
    return facts if validation is None else {**facts, "validation_tokens": _tokens(validation)}


def _tokens(data: Texts) -> int:
    if not isinstance(data, Blocks) or isinstance(data, MaskedBlocks):
        return int(data.token_counts.sum())
    return int(data.target_counts.sum()) + len(data)


def _told(train: Corpus, held: Corpus | None, *sets: Texts | None) -> dict[str, Any]:
    """What the texts are, and what of them is not trained on, if any: rows without text, cut at `sequence_length`."""
    counts = {
        "rows_without_text": train.skipped + (held.skipped if held else 0),
        "rows_cut": sum(part.cut for part in sets if part is not None and not isinstance(part, Blocks)),
        "rows_without_target": sum(part.without_target for part in sets if isinstance(part, Packed | Documents)),
    }
    left_out = {name: count for name, count in counts.items() if count}
    return {"data_digest": _digest(train, held), **left_out}


def _sizes(train: Any, validation: Any) -> dict[str, Any]:
    sizes = {"train_samples": len(train)}
    return sizes if validation is None else {**sizes, "validation_samples": len(validation)}
