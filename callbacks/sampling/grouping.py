"""Samples of alike lengths in one batch: rows are padded to its longest, and padding costs what tokens cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW = 50  # global batches whose samples are sorted together: what is near in the order stays near


def group_by_length(order: Sequence[int], lengths: Any, batch: int, seed: int) -> list[int]:
    """An epoch's order, rearranged so that each global batch of `batch` samples holds alike lengths.

    Sorted are windows of some global batches of a random order, which are then mixed again: every epoch forms others.
    The one with the longest sample comes first, so that a lack of memory shows at once. What fills no whole batch stays
    at the end. A pure function of its arguments.

    Args:
        order: Samples, in a random order.
        lengths: Tokens of each sample [N].
        batch: Samples of a global batch.
        seed: Of the epoch.

    Example:
        >>> group_by_length([0, 1, 2, 3, 4], np.array([9, 1, 8, 2, 5]), batch=2, seed=0)
        [0, 2, 3, 1, 4]

    Source: as `group_by_length` in Hugging Face's transformers.
    """
    whole = len(order) // batch * batch
    windows = [order[start : min(whole, start + WINDOW * batch)] for start in range(0, whole, WINDOW * batch)]
    ordered = [sample for window in windows for sample in longest_first(window, lengths)]
    numbers = mixed(whole // batch, seed)
    if whole:
        first = int(lengths[np.array(ordered)].argmax()) // batch
        numbers = [first, *(number for number in numbers if number != first)]
    groups = [sample for number in numbers for sample in ordered[number * batch : (number + 1) * batch]]
    return [*groups, *order[whole:]]


def longest_first(samples: Sequence[int], lengths: Any) -> list[int]:
    """Samples in descending order of length; equal ones stay in theirs."""
    return [samples[i] for i in np.argsort(-lengths[np.asarray(samples, dtype=np.int64)], kind="stable")]


def mixed(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that the seed decides."""
    return np.random.default_rng(seed).permutation(count).tolist()
