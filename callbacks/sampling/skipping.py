"""A loader that stays as the user has made it, in a run that is resumed amid an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.data import _set_sampler_epoch

from ...seeds import derive_seed
from .seeding import seeded


class SkipConsumed:
    """A loader that stays as it is, read again from its epoch's start, minus the batches already trained on.

    It cannot jump. What it draws at random when an epoch begins, such as an order, depends on the seed and the epoch.
    """

    def __init__(self, loader: Any, trainer: pl.Trainer, seed: int) -> None:
        self.loader, self._trainer, self._seed = loader, trainer, seed

    def __iter__(self) -> Iterator[Any]:
        loop = self._trainer.fit_loop
        epoch = loop.epoch_progress.current.processed
        consumed = loop.epoch_loop.batch_progress.current.ready if loop.epoch_loop.restarting else 0
        _set_sampler_epoch(self.loader, epoch)
        with seeded(derive_seed(self._seed, "order", epoch)):
            batches = iter(self.loader)
            first = list(islice(batches, 1))
        yield from first[consumed:]
        yield from islice(batches, max(0, consumed - 1), None)

    def __len__(self) -> int:
        return len(self.loader)  # TypeError where nobody knows, as for the loader itself

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)
