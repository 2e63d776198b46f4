"""Several data sets of tokens as one, and samples drawn from them by weight.

Which sample stands where is a pure function of the seed and the place, so a run resumes without replaying, and its
global batches are the same for every number of ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ...seeds import derive_seed
from .packing import Texts
from .tokens import Sample


class Joined(Dataset[Sample]):
    """Data sets of tokens one after another.

    `token_counts` and `target_counts` [len(self)], `labels`, `cut` and `without_target` are as those of the parts.
    """

    def __init__(self, parts: Sequence[Texts]) -> None:
        self.parts = list(parts)
        self._starts = list(accumulate(map(len, self.parts), initial=0))
        self.length = self.parts[0].length
        self.deterministic = all(getattr(part, "deterministic", False) for part in self.parts)
        self.group_by_length = all(getattr(part, "group_by_length", False) for part in self.parts)
        counts: list[Any] = [getattr(part, "token_counts", None) for part in self.parts]
        self.token_counts = None if any(each is None for each in counts) else np.concatenate(counts)
        self.target_counts = np.concatenate([part.target_counts for part in self.parts])
        labels: list[Any] = [getattr(part, "labels", None) for part in self.parts]
        self.labels = None if any(each is None for each in labels) else torch.cat(labels)
        self.cut = sum(getattr(part, "cut", 0) for part in self.parts)
        self.without_target = sum(getattr(part, "without_target", 0) for part in self.parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        part, inside = self._place(index)
        return part[inside]

    def targets(self, index: int) -> np.ndarray:
        """The tokens that a sample predicts."""
        part, inside = self._place(index)
        return part.targets(inside)

    def _place(self, index: int) -> tuple[Texts, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = bisect_right(self._starts, index) - 1
        return self.parts[part], int(index) - self._starts[part]


class Mixture(Joined):
    """Data sets that samples are drawn from by weight; see `MixtureOrder`."""

    def __init__(self, parts: Sequence[Texts], weights: Sequence[float], seed: int) -> None:
        super().__init__(parts)
        self.order = MixtureOrder([len(part) for part in self.parts], weights, seed)


class MixtureOrder(Sampler[int]):
    """Numbers of samples of joined data sets, drawn by weight, without end.

    An epoch has as many places as there are samples. A data set has its share of them, to one place, in random order,
    and fills them with its own samples, shuffled; when all have been, they come again, shuffled anew, in the same epoch
    or a later one. What stands at a place depends on the seed, the epoch and the place alone.

    Args:
        sizes: Samples of each data set.
        weights: Of each; their sum need not be 1.
        seed: Of the run.
    """

    shuffles = True

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes, self.seed, self.epoch = list(sizes), seed, 0
        self.draws = shares(sum(sizes), weights)

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order is asked for next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        return iter(self.of_epoch(self.epoch).tolist())

    def of_epoch(self, epoch: int) -> np.ndarray:
        """The samples of an epoch [len(self)], int64."""
        sources = np.repeat(np.arange(len(self.sizes)), self.draws)
        sources = np.random.default_rng(derive_seed(self.seed, "mixture", epoch)).permutation(sources)
        order = np.empty(len(self), dtype=np.int64)
        start = 0
        for number, (size, draws) in enumerate(zip(self.sizes, self.draws, strict=True)):
            order[sources == number] = start + self._drawn(number, epoch * draws, draws)
            start += size
        return order

    def _drawn(self, number: int, begin: int, count: int) -> np.ndarray:
        """Draws `begin` to `begin + count` from data set `number`: its passes one after another."""
        size, parts = self.sizes[number], [np.empty(0, dtype=np.int64)]
        for reading in range(begin // size, -(-(begin + count) // size)):
            shuffled = np.random.default_rng(derive_seed(self.seed, "source", number, reading)).permutation(size)
            first = reading * size
            parts.append(shuffled[max(0, begin - first) : begin + count - first])
        return np.concatenate(parts)


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` as whole numbers in proportion to weights: the largest remainders are rounded up.

    Example:
        >>> shares(11, [0.9, 0.1])
        [10, 1]
    """
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    whole = np.floor(exact).astype(np.int64)
    for number in np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]:
        whole[number] += 1
    return whole.tolist()


AnyTexts = Texts | Joined


def parts_of(data: AnyTexts) -> list[Texts]:
    """The data sets that a joined one has, or that it is."""
    return data.parts if isinstance(data, Joined) else [data]
