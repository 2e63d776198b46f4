"""What a run is about to learn from: before anything is spent, so that a wrong template or column is seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .cache import digest
from .masked_texts import MaskedBlocks, MaskedDocuments
from .mixture import Joined, parts_of
from .packing import Packed
from .seq2seq import SourceTargets
from .tagged import Tagged
from .token_store import IGNORED
from .tokens import Blocks

if TYPE_CHECKING:
    from torch import Tensor

    from .mixture import AnyTexts
    from .prepare import Prepared

SHOWN = 3  # samples
SHOWN_TOKENS = 160  # of each
BETWEEN = "\nrejected instead:\n"
PERCENTILES = (5, 50, 95, 100)

# text, and whether it is trained on
Stretch = tuple[str, bool]


@dataclass(frozen=True)
class Receipt:
    """The data of a run, counted and shown.

    Attributes:
        samples: Of the training set; `documents` rows of text are in them.
        documents: Rows of the training data that have something to train on; 0 where samples are no texts.
        tokens: Of an epoch, without padding.
        trained_tokens: Those of them that are targets of the loss.
        padding: The share of positions that hold no token, in packed samples.
        lengths: Tokens of a document, by percentile, before any is cut.
        left_out: How many rows have no text, are cut, or have no answer before they are cut.
        bad_rows: How many rows cannot be read and are left out, by reason.
        sources: Of several, each one's `source`, `weight`, `samples` and the `epochs` of it that a run draws (one epoch
            of the mixture, where the budget does not say how many samples).
        validation_samples: Held out.
        duplicates: Documents that are held out and trained on, too; None where nobody has counted them.
        shown: Some samples as stretches of text, each trained on or not.
        classes: What is predicted, and how many samples of it there are, where samples have a class.
    """

    samples: int
    documents: int
    tokens: int
    trained_tokens: int
    padding: float
    lengths: Mapping[int, int]
    left_out: Mapping[str, int]
    bad_rows: Mapping[str, int]
    sources: list[dict[str, Any]]
    validation_samples: int
    duplicates: int | None
    shown: list[list[Stretch]]
    classes: Mapping[str, int]

    @property
    def trained_share(self) -> float:
        """Trained tokens of all tokens; 0 where there are none."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The receipt as JSON takes it."""
        return {**asdict(self), "trained_share": self.trained_share}


def receipt(data: Prepared, *, duplicates: bool = True) -> Receipt:
    """The receipt of prepared data. duplicates: also compare what is held out with what is trained on."""
    train, held = data.train, data.validation
    texts = hasattr(train, "store") or isinstance(train, Joined)
    bad, sources = data.facts.get("rows_bad", {}), data.facts.get("sources", [])
    counts: Mapping[str, int] = {}
    labels = getattr(train, "labels", None)
    if data.classes is not None and labels is not None:
        counts = _class_counts(np.asarray(labels), data.classes)
    if not texts:
        size = len(train) if hasattr(train, "__len__") else 0
        held_size = len(held) if hasattr(held, "__len__") else 0
        return Receipt(size, 0, 0, 0, 0.0, {}, _left_out(data), bad, sources, held_size, None, [], counts)
    lengths = np.concatenate([np.diff(part.store.offsets) for part in parts_of(train)])
    tokens = data.facts["train_tokens"]
    positions = len(train) * train.length if isinstance(parts_of(train)[0], Blocks | Packed) else 0
    return Receipt(
        samples=len(train),
        documents=getattr(train, "row_count", len(lengths) - getattr(train, "without_target", 0)),
        tokens=tokens,
        trained_tokens=_trained_tokens(data),
        padding=1 - tokens / positions if positions else 0.0,
        lengths={p: int(np.percentile(lengths, p, method="higher")) for p in PERCENTILES},
        left_out=_left_out(data),
        bad_rows=bad,
        sources=sources,
        validation_samples=0 if held is None else len(held),
        duplicates=_duplicates(train, held) if duplicates and held is not None else None,
        shown=_shown(data),
        classes=counts,
    )


def _trained_tokens(data: Prepared) -> int:
    if "trained_tokens" in data.facts:
        return int(data.facts["trained_tokens"])
    of_rows = getattr(data.train, "labels", None) is not None and not isinstance(parts_of(data.train)[0], Tagged)
    return 0 if of_rows else int(data.train.target_counts.sum())


def _class_counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """Samples of each class that occurs, of labels [N], or [N, classes] where a sample has several."""
    counts = labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts, strict=True) if count}


def _label_shown(label: Any, classes: Sequence[str] | None) -> str:
    if classes is None:
        return f"{float(label):g}"
    if label.ndim:
        return ", ".join(name for name, has in zip(classes, label.tolist(), strict=True) if has) or "none"
    return classes[int(label)]


def _left_out(data: Prepared) -> dict[str, int]:
    names = ("rows_without_text", "rows_cut", "rows_without_target")
    return {name: data.facts[name] for name in names if name in data.facts}


def _spread(samples: int) -> list[int]:
    """The first, the middle and the last."""
    return sorted({round(i * (samples - 1) / (SHOWN - 1)) for i in range(SHOWN)})


def _shown(data: Prepared) -> list[list[Stretch]]:
    with torch.random.fork_rng(devices=[]):  # masked samples are random
        return [_stretches(data, index) for index in _spread(len(data.train))]


def _stretches(data: Prepared, index: int) -> list[Stretch]:
    """A sample's text in stretches that are, or are not, targets; padding is not shown."""
    sample = data.train[index]
    if sample["input_ids"].ndim == 2:  # two answers to one prompt
        chosen, rejected = (_marked(data, *pair) for pair in zip(sample["input_ids"], sample["labels"], strict=True))
        return [*chosen, (BETWEEN, False), *rejected]
    ids, labels = sample["input_ids"], sample["labels"]
    if isinstance(parts_of(data.train)[0], SourceTargets):
        source, target = (data.tokenizer.decode(each[:SHOWN_TOKENS]) for each in (ids, labels))
        return [(source, False), ("\n→ ", False), (target, True)]
    if not labels.ndim or labels.is_floating_point():
        label = _label_shown(labels, data.classes)
        return [(data.tokenizer.decode(ids[:SHOWN_TOKENS]), False), (f" → {label}", True)]
    shown = _marked(data, ids, labels)
    return shown if "wanted" not in sample else [*shown, ("\nwanted" if sample["wanted"] else "\nnot wanted", False)]


def _marked(data: Prepared, ids: Tensor, labels: Tensor) -> list[Stretch]:
    ids = ids[:SHOWN_TOKENS]
    marks = (labels[: len(ids)] != IGNORED).tolist()
    if not isinstance(parts_of(data.train)[0], MaskedBlocks | MaskedDocuments | Tagged):
        marks[0] = False  # nothing stands before it
    return [
        (data.tokenizer.decode(some), trained)
        for some, trained in _runs(ids.tolist(), marks, data.tokenizer.pad_token_id)
    ]


def _runs(ids: list[int], marks: list[bool], pad: int | None) -> Iterator[tuple[list[int], bool]]:
    start, end = 0, len(ids)
    while end and ids[end - 1] == pad and not marks[end - 1]:
        end -= 1
    for at in range(1, end + 1):
        if at == end or marks[at] != marks[start]:
            yield ids[start:at], marks[start]
            start = at


def _duplicates(train: AnyTexts, held: AnyTexts) -> int:
    """Documents of `held` that are in `train`, token by token."""
    return len(_documents(held) & _documents(train))


def _documents(data: AnyTexts) -> set[str]:
    stores = [part.store for part in parts_of(data)]
    return {digest([store.document(i).tobytes()]) for store in stores for i in range(len(store.offsets) - 1)}
