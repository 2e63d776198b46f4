"""Loaders whose batches come in the order of `GlobalBatches`: installed once a fit, by whoever asks first.

Taken over is what torch itself puts together: a `DataLoader` over a sampler that knows nothing of ranks. What has an
order or a loop of its own stays as it is, as in a plain `pl.Trainer`, and one line says so: a subclass of `DataLoader`,
a sampler that shares out among ranks by itself, and everything where the trainer has `use_distributed_sampler=False`.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.types import _Stateful
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.trainer.connectors.data_connector import (
    _DataLoaderSource,
    _parse_num_batches,
    _request_dataloader,
    _resolve_overfit_batches,
)
from pytorch_lightning.trainer.states import RunningStage
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
from .global_batches import GlobalBatches, nested
from .seeding import SeededCollate, SeededSamples, collates_alike, is_deterministic
from .skipping import SkipConsumed
from .workers import shield

log = logging.getLogger("shoestring")


def reorder(loader: Any, *, training: bool, seed: int, trainer: pl.Trainer, order: GlobalBatches | None = None) -> Any:
    """`loader` with its batches taken from `GlobalBatches`; one that stays as it is only learns to skip what is done.

    order: what techniques know as the order, where loaders are reloaded: it goes on with the new data.
    """
    if isinstance(getattr(loader, "batch_sampler", None), GlobalBatches | EvenBatches) or isinstance(
        loader, EvenStream
    ):
        return loader
    if isinstance(loader, DataLoader):
        shield(loader)
    why = _stays(loader, trainer)
    if why is not None:
        if why and trainer.is_global_zero:
            log.warning("the %s loader keeps its own order: %s", "training" if training else "validation", why)
        if not training:
            return loader if why else _even_stream(loader, trainer)
        if isinstance(loader, _Stateful):
            return loader
        return SkipConsumed(
            trainer._data_connector._prepare_dataloader(loader, True, RunningStage.TRAINING), trainer, seed
        )
    base, micro, drop_last = _base(loader)
    own_batches = type(loader.batch_sampler) is not BatchSampler
    lengths = None if own_batches else getattr(loader.dataset, "token_counts", None)
    grouped = lengths is not None and bool(getattr(loader.dataset, "group_by_length", False))
    if not training:
        even = EvenBatches(
            base, micro=micro, rank=trainer.global_rank, world=trainer.world_size, seed=seed,
            lengths=lengths if grouped else None,
        )  # fmt: skip
        return _rebuilt(loader, loader.dataset, even, seed)
    keyed = not (is_deterministic(loader.dataset) and collates_alike(loader))
    in_steps = not counts_batches(trainer)
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    batches = GlobalBatches(
        base,
        micro=micro,
        accumulate=trainer.accumulate_grad_batches if in_steps else 1,
        rank=trainer.global_rank,
        world=trainer.world_size,
        seed=seed,
        position=(lambda: clock_of(trainer).step) if in_steps else lambda: progress.processed,
        drop_last=drop_last,
        keyed=keyed,
    )
    if len(batches):
        most = _parse_num_batches(RunningStage.TRAINING, len(batches), trainer.limit_train_batches)
        batches.most_steps = -(-int(most) // batches.accumulate)
    targets = getattr(loader.dataset, "target_counts", None)
    if targets is not None and len(targets) and (targets != targets[0]).any() and not own_batches:
        batches.targets = targets
    if lengths is not None:
        shuffles = isinstance(base, RandomSampler) or getattr(base, "shuffles", False)
        batches.lengths, batches.grouped = lengths, grouped and shuffles
    if order is not None:
        batches = order.with_data_of(batches)
    return _rebuilt(loader, SeededSamples(loader.dataset) if keyed else loader.dataset, batches, seed)


def counts_batches(trainer: pl.Trainer) -> bool:
    """Whether optimizer steps and micro-batches have no fixed ratio: then the order is in micro-batches."""
    changes = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return changes or not trainer.lightning_module.automatic_optimization


def _stays(loader: Any, trainer: pl.Trainer) -> str | None:
    """Why a loader stays as it is, empty where there is no order to speak of; None where it is taken over."""
    if (
        not isinstance(loader, DataLoader)
        or loader.batch_sampler is None
        or isinstance(loader.dataset, IterableDataset)
    ):
        return ""
    if type(loader) is not DataLoader:
        return f"{type(loader).__name__} is a loader class of its own"
    if not trainer._accelerator_connector.use_distributed_sampler:
        return "the trainer has use_distributed_sampler=False"
    for sampler in nested(loader.batch_sampler):
        if _knows_ranks(sampler) and not _is_plain(sampler, trainer):
            return f"{type(sampler).__name__} shares it out among ranks by itself"
        if not hasattr(sampler, "__len__"):
            return f"{type(sampler).__name__} has no length"
    return None


def _knows_ranks(sampler: Any) -> bool:
    names = ("num_replicas", "world_size", "rank")
    return isinstance(sampler, DistributedSampler) or any(hasattr(sampler, name) for name in names)


def _is_plain(sampler: Any, trainer: pl.Trainer) -> bool:
    """Whether it is torch's own sampler, for the ranks that there are."""
    ranks = (trainer.world_size, trainer.global_rank)
    return type(sampler) is DistributedSampler and (sampler.num_replicas, sampler.rank) == ranks


def _requires_sampler(requires: Any, loader: DataLoader[Any]) -> bool:
    """Lightning's question whether it is to share a loader out among ranks: not where that is done already."""
    own = (loader.batch_sampler, *nested(loader.batch_sampler))
    return not any(isinstance(s, GlobalBatches | EvenBatches) or _knows_ranks(s) for s in own) and requires(loader)


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


class _Reordered(_DataLoaderSource):
    """Where a loop takes its loaders from, in our order: when it begins, and whenever Lightning reloads them."""

    def __init__(self, source: _DataLoaderSource, seed: int, trainer: pl.Trainer, training: bool) -> None:
        self.seed, self.trainer, self.training = seed, trainer, training
        super().__init__(source.instance, source.name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "instance":  # Lightning sets it where a fit begins
            self.loaders: Any = None
            self.order: GlobalBatches | None = None
            self._ahead = False

    def ask_ahead(self) -> None:
        """Have the loaders before Lightning asks for them: techniques want to know the order when the fit begins."""
        self.loaders = _request_dataloader(self)
        self._ahead = True

    def dataloader(self) -> Any:
        ahead, self._ahead = self._ahead, False
        if ahead and not (self.trainer.reload_dataloaders_every_n_epochs and self.trainer.current_epoch):
            return self.loaders
        mode = RunningStage.TRAINING if self.training else RunningStage.VALIDATING
        self.loaders = self._reordered(super().dataloader(), mode)
        return self.loaders

    def _reordered(self, loaders: Any, mode: RunningStage) -> Any:
        single = isinstance(loaders, DataLoader) or not isinstance(loaders, dict | list | tuple | CombinedLoader)
        if self.training and not single:
            return loaders
        combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
        if self.trainer.overfit_batches > 0:
            _resolve_overfit_batches(combined, mode)
        if combined._mode != "sequential":  # its loaders are read side by side, and each batch is of several
            return combined
        combined.flattened = [
            reorder(one, training=self.training, seed=self.seed, trainer=self.trainer, order=self.order)
            for one in combined.flattened
        ]
        if not single:
            return combined
        batches = getattr(combined.flattened[0], "batch_sampler", None)
        if self.training and isinstance(batches, GlobalBatches):
            self.order = batches
        return combined.flattened[0]


def order_of(trainer: pl.Trainer) -> GlobalBatches | None:
    """The training order that `install_sampler` has installed, if it has."""
    source = trainer.fit_loop._data_source
    return source.order if isinstance(source, _Reordered) else None


def _even_stream(loader: Any, trainer: pl.Trainer) -> Any:
    if trainer.world_size == 1 or isinstance(loader, EvenStream):
        return loader
    return EvenStream(loader, Agreement(2))


def install_sampler(trainer: pl.Trainer, seed: int) -> GlobalBatches | None:
    """Route the trainer's loaders through `reorder`; called in `on_fit_start`. Returns the training order, if any.

    Asked twice is asked once. Several training loaders at a time keep Lightning's own order.
    """
    fit = trainer.fit_loop
    if not isinstance(fit._data_source, _Reordered):
        _share_out_once(trainer)
        fit._data_source = _Reordered(fit._data_source, seed, trainer, training=True)
    evaluate_evenly(trainer, fit.epoch_loop.val_loop, seed)
    source: Any = fit._data_source
    if source.loaders is None and source.is_defined() and trainer.limit_train_batches != 0:
        source.ask_ahead()
    return source.order


def evaluate_evenly(trainer: pl.Trainer, loop: Any, seed: int) -> None:
    """Have an evaluation loop of the trainer count every sample once, on any number of ranks."""
    if not isinstance(loop._data_source, _Reordered):
        _share_out_once(trainer)
        loop.__class__ = EvenEvaluation
        loop._data_source = _Reordered(loop._data_source, seed, trainer, training=False)


def _share_out_once(trainer: pl.Trainer) -> None:
    """What is shared out among ranks by us or by itself Lightning does not share out again."""
    connector: Any = trainer._data_connector
    if "_requires_distributed_sampler" not in vars(connector):
        connector._requires_distributed_sampler = partial(_requires_sampler, connector._requires_distributed_sampler)


def given_loaders(trainer: pl.Trainer) -> Any:
    """The training loaders as the user has made them."""
    source = trainer.fit_loop._data_source
    return _DataLoaderSource(source.instance, source.name).dataloader()


def training_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """The loader whose order `install_sampler` has returned."""
    return trainer.fit_loop._data_source.loaders  # type: ignore[attr-defined, no-any-return]
