"""Who is held out: a pure function of the content, never of the seed, the order or the number of ranks.

Every run of every seed on the same data has the same validation set, so their losses can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .cache import build_once, digest
from .corpora import Corpus
from .errors import TaskError


def split(
    corpus: Corpus, fraction: float, cache: Path | None = None, *, by_label: bool = True
) -> tuple[Corpus, Corpus]:
    """A corpus as (training, validation); see `split_indices`. Without groups, equal texts stay together.

    cache: where the first to ask leaves who is held out: it takes reading all texts. by_label: labels are classes, and
    each of them is on both sides.
    """
    labels = corpus.labels if by_label else None

    def chosen() -> tuple[np.ndarray, np.ndarray]:
        groups = corpus.groups or (digest([text or ""]) for text in corpus.texts)
        return split_indices(groups, labels, fraction, len(corpus.texts))

    if cache is None:
        outside, inside = chosen()
    else:

        def build(folder: Path) -> None:
            for name, rows in zip(("outside", "inside"), chosen(), strict=True):
                np.save(folder / f"{name}.npy", rows)

        labelled = "" if labels is None else "labelled"
        folder = build_once(cache / "splits" / digest([corpus.fingerprint, labelled, repr(fraction)]), build)
        outside, inside = np.load(folder / "outside.npy"), np.load(folder / "inside.npy")
    return replace(corpus.take(outside), skipped=corpus.skipped, bad=corpus.bad), corpus.take(inside)


def split_indices(
    groups: Iterable[str], labels: Sequence[Any] | None, fraction: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows train and which are held out: about `fraction` of them, whole groups at a time, smallest hash first.

    With labels the choice is made within each label, so that every class is on both sides; a group that has several
    labels is still never cut. Both are in order. Raises `TaskError` where one would be empty.

    Args:
        groups: Of each of the `count` rows, the group that it belongs to.
        labels: Of each row, or None.
    """
    # 16 bytes a row, however long the names of groups are
    hashes = np.fromiter((bytes.fromhex(digest([group])) for group in groups), dtype="S16", count=count)
    classes = np.zeros(count, dtype=np.int64)
    if labels is not None:
        classes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)[1]
    held = [_held_out(hashes[classes == number], fraction) for number in range(int(classes.max(initial=0)) + 1)]
    is_held = np.isin(hashes, np.concatenate(held))
    outside, inside = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    if not len(inside) or not len(outside):
        raise TaskError(
            f"data.validation {fraction} of {len(np.unique(hashes))} document(s) leaves one side empty. "
            "Give a validation file, more documents, or validation: 0."
        )
    return outside, inside


def balance(corpus: Corpus) -> Corpus:
    """The same number of texts for every label: the smallest label's, chosen by hash from the others."""
    if corpus.labels is None:
        return corpus
    by_label: dict[Any, list[int]] = {}
    for i, label in enumerate(corpus.labels):
        by_label.setdefault(label, []).append(i)
    smallest = min(map(len, by_label.values()))
    keys = [digest([text, str(i)]) for i, text in enumerate(corpus.texts)]
    kept = [i for part in by_label.values() for i in sorted(part, key=keys.__getitem__)[:smallest]]
    return corpus.take(sorted(kept))


def _held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Groups in the order of their hashes until the fraction of the texts is reached; at least one."""
    # the small term keeps 0.1 * 30 = 3.0000000000000004 from asking for a fourth text
    wanted = max(1, math.ceil(fraction * len(hashes) - 1e-9))
    ordered, counts = np.unique(hashes, return_counts=True)
    return ordered[: np.searchsorted(np.cumsum(counts), wanted) + 1]
