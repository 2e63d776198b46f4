"""What a language model must beat before its loss means anything, in nats per token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from .cache import build_once, digest
from .mixture import AnyTexts, parts_of


def baselines(train: AnyTexts, validation: AnyTexts, vocabulary: int, cache: Path | None = None) -> dict[str, float]:
    """`uniform` and `unigram` losses on exactly the targets that `val_loss` is measured on.

    cache: where the first to ask leaves them: counting reads all tokens.
    """

    def count() -> dict[str, float]:
        counts = target_counts(train, vocabulary), target_counts(validation, vocabulary)
        return {"uniform": uniform(vocabulary), "unigram": unigram(*counts)}

    if cache is None:
        return count()
    data = [
        "+".join(f"{type(each).__name__} {each.store.folder.name} {each.length} {len(each)}" for each in parts_of(both))
        for both in (train, validation)
    ]

    def build(folder: Path) -> None:
        (folder / "losses.json").write_text(json.dumps(count()))

    return json.loads(
        (build_once(cache / "baselines" / digest([*data, str(vocabulary)]), build) / "losses.json").read_text()
    )


def uniform(vocabulary: int) -> float:
    """The loss of knowing nothing: ln V."""
    return math.log(vocabulary)


def unigram(train: np.ndarray, validation: np.ndarray) -> float:
    """The loss of knowing only how frequent each token is.

    train, validation: counts by token number [V]. Cross entropy of the validation tokens under the training
    frequencies, with one added to each count so that an unseen token has a finite cost (Laplace).
    """
    frequencies = (train + 1) / (train.sum() + len(train))
    return float(-(validation * np.log(frequencies)).sum() / validation.sum())


def target_counts(data: AnyTexts, vocabulary: int) -> np.ndarray:
    """Return how often each token is a target [V], in int64."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for start in range(0, len(data), 1000):
        rows = [data.targets(i) for i in range(start, min(start + 1000, len(data)))]
        counts += np.bincount(np.concatenate(rows), minlength=vocabulary)
    return counts
