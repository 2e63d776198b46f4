"""Evaluation on several ranks: every sample counts once, and every rank calls the model equally often.

Ranks that call a model wait for each other: under ZeRO-3 for its weights, under DDP for its buffers, and wherever a
step reduces something. So a rank that has run out of samples before the others repeats one; what its step adds to sums
and metrics is taken back (undone.py), and no callback hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from pytorch_lightning.loops.evaluation_loop import _EvaluationLoop
from pytorch_lightning.trainer import call
from torch.utils.data import Sampler

from ... import ShoestringError
from ...seeds import derive_seed
from ..accounting.agreement import Agreement
from .global_batches import _flat, nested
from .grouping import longest_first, mixed
from .seeding import seeded
from .undone import undone


class NoSamples(ShoestringError):
    """A rank has nothing to evaluate on, and nothing to repeat either."""


class EvenBatches(Sampler[list[Any]]):
    """This rank's evaluation batches: every sample once, equally many batches on every rank, no batch above `micro`.

    `base` is the loader's own sampler, or its batch sampler; then one of its batches is the unit and `micro` is 1. Its
    randomness is seeded: all ranks share out the same order, the same one in each evaluation. Where the last batches do
    not go round, some ranks get one that `repeats` says not to count.

    lengths: tokens of each sample, where those of alike lengths are to share a batch. The batches then come in a mixed
    order that is always the same, so that the first few are no choice by length.
    """

    def __init__(self, base: Any, *, micro: int, rank: int, world: int, seed: int = 0, lengths: Any = None) -> None:
        self.base, self.micro, self.rank, self.world, self.seed = base, micro, rank, world, seed
        self.lengths = lengths

    @cached_property
    def order(self) -> list[Any]:
        """All units, as every rank has them."""
        seed = derive_seed(self.seed, "evaluation")
        with seeded(seed):
            for sampler in nested(self.base):
                if getattr(sampler, "generator", None) is not None:
                    sampler.generator.manual_seed(seed)
            order = list(self.base)
        return order if self.lengths is None else longest_first(order, self.lengths)

    @cached_property
    def _batches(self) -> list[int]:
        """The number of each batch in the order."""
        return list(range(len(self)) if self.lengths is None else mixed(len(self), 0))

    def __len__(self) -> int:
        return -(-len(self.order) // (self.micro * self.world))

    def __iter__(self) -> Iterator[list[Any]]:
        order, parts = self.order, len(self) * self.world
        for batch in self._batches:
            part = batch * self.world + self.rank
            if len(order) >= parts:
                yield _flat(order[len(order) * part // parts : len(order) * (part + 1) // parts])
            else:
                yield _flat([order[part % len(order)]])

    def repeats(self, batch: int) -> bool:
        """Whether a batch of this rank, by its number in an evaluation, holds what another rank counts."""
        return self._batches[batch] * self.world + self.rank >= len(self.order)


class Repeated:
    """A batch that is not to be counted."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


class EvenStream:
    """A loader that no sampler rules, such as a stream's, read equally often on every rank.

    Ranks ask each other before each batch who has one; those that have none repeat their last one. Collective, like its
    construction.
    """

    def __init__(self, loader: Any, agreement: Agreement) -> None:
        self.loader, self._agreement = loader, agreement
        lengths = agreement.gather(_length(loader))
        self._length = None if None in lengths else max(lengths)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("nobody knows how many batches the stream has")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        batches, world = iter(self.loader), self._agreement.world_size
        latest: Any = None
        while True:
            batch = next(batches, _END)
            mine = batch is not _END
            latest = Repeated(batch) if mine else latest
            having, able = self._agreement.now([float(mine), float(latest is not None)])
            if not having:
                return
            if able < world:
                raise NoSamples(
                    f"validation: the stream has no batch on {world - int(able)} of {world} ranks, which could then "
                    "take no part in the evaluation. Give every rank a batch, or a map-style data set, which is "
                    "shared out."
                )
            yield batch if mine else latest


_END = object()


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


class EvenEvaluation(_EvaluationLoop):
    """Lightning's loop over evaluation batches, but for repeated ones, of which nothing stays."""

    after_repeated: Callable[[], None] | None = None  # what ranks say to each other after every batch

    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        if isinstance(batch, Repeated):
            self._repeat(batch.batch, batch_idx, dataloader_idx)
        elif dataloader_iter is None and self._is_repeated(batch_idx, dataloader_idx):
            self._repeat(batch, batch_idx, dataloader_idx)
        else:
            super()._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)

    def _store_dataloader_outputs(self) -> None:
        for metric in (self._results or {}).values():
            if metric.is_tensor and metric.meta.is_mean_reduction:
                # Lightning takes its mean over ranks, which would be rounded down to a whole number
                metric.cumulated_batch_size = metric.cumulated_batch_size.double()
        super()._store_dataloader_outputs()

    def _is_repeated(self, batch_idx: int, dataloader_idx: int) -> bool:
        assert self._combined_loader is not None
        if not self._is_sequential:
            return False
        batches = getattr(self._combined_loader.flattened[dataloader_idx], "batch_sampler", None)
        return isinstance(batches, EvenBatches) and batches.repeats(batch_idx)

    def _repeat(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """What the loop does with a batch, without the hooks."""
        trainer, module = self.trainer, self.trainer.lightning_module
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=dataloader_idx)
        loader = dataloader_idx if self._is_sequential and self.num_dataloaders > 1 else None
        given = self._build_kwargs(batch, batch_idx, loader)
        with undone(module, self._results):
            trainer._logger_connector.on_batch_start(batch, loader)
            hook = "test_step" if trainer.testing else "validation_step"
            call._call_strategy_hook(trainer, hook, *self._build_step_args_from_hook_kwargs(given, hook))
            trainer._logger_connector.on_batch_end()
        self.batch_progress.increment_ready()
        self.batch_progress.increment_started()
        self.batch_progress.increment_processed()
        self.batch_progress.increment_completed()
        if self.after_repeated is not None:
            self.after_repeated()
