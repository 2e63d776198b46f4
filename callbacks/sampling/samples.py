"""Loaders whose batches come in the order of `GlobalBatches`: installed once, by whoever asks first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.connectors.data_connector import _DataLoaderSource
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from ...seeds import derive_seed
from ..accounting.agreement import Agreement
from ..accounting.clock import clock_of
from .evaluation import EvenBatches, EvenEvaluation, EvenStream
from .global_batches import GlobalBatches
from .seeding import SeededCollate, SeededSamples, collates_alike, is_deterministic
from .workers import shield


class SkipConsumed:
    """An iterable loader read again from its start, minus the batches already trained on: it cannot jump."""

    def __init__(self, loader: Any, consumed: Callable[[], int]) -> None:
        self.loader, self.consumed = loader, consumed

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for _ in range(self.consumed()):
            next(batches, None)
        return batches

    def __len__(self) -> int:
        return len(self.loader)  # TypeError where nobody knows, as for the loader itself


def reorder(loader: Any, *, training: bool, seed: int, trainer: pl.Trainer) -> Any:
    """`loader` with its batches taken from `GlobalBatches`; iterable loaders only learn to skip what is consumed."""
    if isinstance(loader, DataLoader):
        shield(loader)
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return _skipping(loader, trainer) if training else _even_stream(loader, trainer)
    if isinstance(loader.dataset, IterableDataset):
        return _skipping(loader, trainer) if training else _even_stream(loader, trainer)
    if isinstance(loader.batch_sampler, GlobalBatches | EvenBatches):
        return loader
    base, micro, drop_last = _base(loader)
    if not training:
        even = EvenBatches(base, micro=micro, rank=trainer.global_rank, world=trainer.world_size, seed=seed)
        return _rebuilt(loader, loader.dataset, even, seed)
    keyed = not (is_deterministic(loader.dataset) and collates_alike(loader))
    own_batches = type(loader.batch_sampler) is not BatchSampler
    batches = GlobalBatches(
        base,
        micro=micro,
        accumulate=trainer.accumulate_grad_batches,
        rank=trainer.global_rank,
        world=trainer.world_size,
        seed=seed,
        position=lambda: clock_of(trainer).step,
        drop_last=drop_last,
        keyed=keyed,
    )
    targets = getattr(loader.dataset, "target_counts", None)
    if targets is not None and len(targets) and (targets != targets[0]).any() and not own_batches:
        batches.targets = targets
    return _rebuilt(loader, SeededSamples(loader.dataset) if keyed else loader.dataset, batches, seed)


def _rebuilt(loader: DataLoader[Any], dataset: Any, batches: Sampler[Any], seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "loader"))  # iterators then leave the global RNG alone
    return type(loader)(
        dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=SeededCollate(loader.collate_fn) if isinstance(dataset, SeededSamples) else loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _base(loader: DataLoader[Any]) -> tuple[Any, int, bool]:
    """The order-giving sampler of a loader, its micro-batch, and whether it drops a partial batch."""
    sampler: Any = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler:
        return loader.batch_sampler, 1, bool(getattr(loader.batch_sampler, "drop_last", False))
    if isinstance(sampler, DistributedSampler):  # sharding is done here, over the order it would have given
        sampler = RandomSampler(loader.dataset) if sampler.shuffle else SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    return sampler, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last


def _skipping(loader: Any, trainer: pl.Trainer) -> Any:
    return SkipConsumed(loader, lambda: trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def _even_stream(loader: Any, trainer: pl.Trainer) -> Any:
    if trainer.world_size == 1 or isinstance(loader, EvenStream):
        return loader
    return EvenStream(loader, Agreement(2))


def install_sampler(trainer: pl.Trainer, seed: int) -> GlobalBatches | None:
    """Route the trainer's loaders through `reorder`; called in `on_fit_start`. Returns the training order, if any.

    Asked twice is asked once. Several training loaders at a time keep Lightning's own order.
    """
    trainer._accelerator_connector.use_distributed_sampler = False
    for loop, training in ((trainer.fit_loop, True), (trainer.fit_loop.epoch_loop.val_loop, False)):
        source = loop._data_source
        if not source.is_defined():
            continue
        loaders = _reorder_all(source.dataloader(), training, seed, trainer)
        loop._data_source = _DataLoaderSource(loaders, "")
    trainer.fit_loop.epoch_loop.val_loop.__class__ = EvenEvaluation
    loader = trainer.fit_loop._data_source.instance
    return loader.batch_sampler if isinstance(getattr(loader, "batch_sampler", None), GlobalBatches) else None


def _reorder_all(loaders: Any, training: bool, seed: int, trainer: pl.Trainer) -> Any:
    if isinstance(loaders, DataLoader) or not isinstance(loaders, dict | list | tuple | CombinedLoader):
        return reorder(loaders, training=training, seed=seed, trainer=trainer)
    if training:
        return loaders
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    if combined._mode != "sequential":  # its loaders are read side by side, and each batch is of several
        return combined
    combined.flattened = [reorder(one, training=False, seed=seed, trainer=trainer) for one in combined.flattened]
    return combined
