"""Who is held out: a pure function of the content, never of the seed, the order or the number of ranks.

Every run of every seed on the same data has the same validation set, so their losses can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .cache import digest
from .corpora import Corpus
from .errors import TaskError


def split(corpus: Corpus, fraction: float, *, by_label: bool = True) -> tuple[Corpus, Corpus]:
    """A corpus as (training, validation); see `split_indices`. Without groups, equal texts stay together.

    by_label: labels are classes, and each of them is on both sides.
    """
    groups = corpus.groups or [digest([text or ""]) for text in corpus.texts]
    outside, inside = split_indices(groups, corpus.labels if by_label else None, fraction)
    return replace(corpus.take(outside), skipped=corpus.skipped), corpus.take(inside)


def split_indices(groups: Sequence[str], labels: Sequence[Any] | None, fraction: float) -> tuple[list[int], list[int]]:
    """Which rows train and which are held out: about `fraction` of them, whole groups at a time, smallest hash first.

    With labels the choice is made within each label, so that every class is on both sides; a group that has several
    labels is still never cut. Both lists are in order. Raises `TaskError` where one would be empty.
    """
    sizes: dict[Any, dict[str, int]] = {}
    for group, label in zip(groups, labels or [None] * len(groups), strict=True):
        of_label = sizes.setdefault(label, {})
        of_label[group] = of_label.get(group, 0) + 1
    held = {group for of_label in sizes.values() for group in _held_out(of_label, fraction)}
    inside = [i for i, group in enumerate(groups) if group in held]
    outside = [i for i, group in enumerate(groups) if group not in held]
    if not inside or not outside:
        raise TaskError(
            f"data.validation {fraction} of {len(set(groups))} document(s) leaves one side empty. "
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


def _held_out(sizes: dict[str, int], fraction: float) -> list[str]:
    """Groups in the order of their hashes until the fraction of the texts is reached; at least one."""
    # the small term keeps 0.1 * 30 = 3.0000000000000004 from asking for a fourth text
    wanted, held, count = max(1, math.ceil(fraction * sum(sizes.values()) - 1e-9)), [], 0
    for group in sorted(sizes, key=lambda g: digest([g])):
        if count >= wanted:
            break
        held.append(group)
        count += sizes[group]
    return held
