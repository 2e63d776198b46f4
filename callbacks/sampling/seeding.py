"""Randomness that depends on what is read, not on who reads it or when: samples, and putting them together.

A resumed run, another number of workers or of ranks then sees the same random crops and masks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, get_worker_info


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed python's, numpy's and torch's CPU generators inside the block, and put them back after it."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    reseed(seed)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


def reseed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


class SeededSamples(Dataset[Any]):
    """A dataset whose randomness depends on (seed, epoch, sample) alone, whichever worker or attempt reads it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """A sample outside the training order, as the dataset gives it."""
        return self.dataset[index]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        if get_worker_info() is not None:
            return self._read_all(keys)
        with seeded(0):
            return self._read_all(keys)

    def _read_all(self, keys: list[tuple[int, int]]) -> list[Any]:
        read = _Read(self._read(*key) for key in keys)
        read.seed = keys[0][1] ^ 1
        return read

    def _read(self, index: int, seed: int) -> Any:
        reseed(seed)
        return self.dataset[index]


class _Read(list[Any]):
    seed = 0  # of what is random in putting these samples together


class SeededCollate:
    """A collate function, such as a masking one, whose randomness depends on the samples and their epoch alone."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        with seeded(getattr(samples, "seed", 0)):
            return self.collate(samples)


def is_deterministic(dataset: Any) -> bool:
    """Whether reading a sample twice is known to give the same: then it needs no seed of its own."""
    if getattr(dataset, "deterministic", False) or isinstance(dataset, TensorDataset):
        return True
    inner = getattr(dataset, "dataset", None)  # Subset and its like
    return inner is not None and type(dataset).__module__.startswith("torch.utils.data") and is_deterministic(inner)


def collates_alike(loader: DataLoader[Any]) -> bool:
    return loader.collate_fn is default_collate or getattr(loader.dataset, "deterministic", False)
