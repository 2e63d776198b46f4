"""Sample order: which samples each global batch holds, on every rank, at every step.

The order is a pure function of (seed, epoch) and the position of the optimizer step, never of the number of ranks or
of what was run before. So resuming skips in O(1), mid-epoch, with loader workers; and a run that resumes on another
number of ranks sees the same global batches. An epoch is a whole number of global batches: the last one is filled up
from the start of the same epoch's order (as `DistributedSampler` pads), or dropped where the loader says `drop_last`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from ..accounting.clock import clock_of
from .seeding import SeededCollate, SeededSamples, collates_alike, is_deterministic, seeded
from .workers import shield

# (epoch, step in the epoch, step of the run, the samples that would be taken) -> the samples to take
Select = Callable[[int, int, int, Sequence[int]], Sequence[int]]
# step of the run -> samples of its global batch; see `GlobalBatches.sizes`
Sizes = Callable[[int], int]


@dataclass(frozen=True)
class Drawn:
    """One micro-batch of this rank.

    samples: their keys in the data set, in the order of the batch's rows. loss_weight: what makes a mean over
    micro-batches one over all targets of the global batch; None where all have as many.
    """

    samples: tuple[Any, ...]
    loss_weight: float | None = None


class Place(NamedTuple):
    """The begin of an optimizer step: its epoch, its number there, and how many samples of the order are used."""

    epoch: int = 0
    step: int = 0
    used: int = 0


class GlobalBatches(Sampler[list[Any]]):
    """This rank's micro-batches, cut from global batches of `micro * world * accumulate` samples.

    `base` is the loader's own sampler (its randomness is re-seeded every epoch) or batch sampler (then one of its
    batches is the unit and `micro` is 1). `position()` gives the optimizer step to start from.

    Techniques set `select`, which chooses the samples of a global batch, and `sizes`, which makes global batches
    smaller than `global_batch`: a pure function of the step, or of the clock as it was known when batches are drawn
    ahead (`Clock.toward` with `known`). All micro-batches of a step are then equally small, and epochs differ in their
    number of steps.
    """

    def __init__(
        self,
        base: Any,
        *,
        micro: int,
        accumulate: int,
        rank: int,
        world: int,
        seed: int,
        position: Callable[[], int],
        drop_last: bool = False,
        keyed: bool = False,
    ) -> None:
        self.base, self.micro, self.accumulate, self.rank, self.world = base, micro, accumulate, rank, world
        self.seed, self.position, self.drop_last, self.keyed = seed, position, drop_last, keyed
        self.select: Select | None = None
        self.sizes: Sizes | None = None
        self.targets: Any = None  # how many targets each sample has, where that differs
        self.remembers = False  # set it in `on_fit_start` to ask for `drawn`
        self._under_way: dict[int, Drawn] = {}  # by micro-batch of the epoch

    @property
    def global_batch(self) -> int:
        return self.micro * self.world * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        """The steps of the epoch that the run is in, where they differ."""
        if self.sizes is not None:
            run_step = self.position()
            place = self.place(run_step)
            while (following := self._next(place, run_step)).epoch == place.epoch:
                place, run_step = following, run_step + 1
            return place.step + 1
        whole, rest = divmod(len(self.base), self.global_batch)
        return whole if self.drop_last and whole else whole + bool(rest)

    def place(self, position: int) -> Place:
        """Return where optimizer step `position` of the run begins."""
        if self.sizes is None:
            epoch, step = divmod(position, self.steps_per_epoch)
            return Place(epoch, step, step * self.global_batch)
        place = Place()
        for step in range(position):
            place = self._next(place, step)
        return place

    def _micro(self, run_step: int) -> int:
        """Samples of a micro-batch at a step of the run."""
        if self.sizes is None:
            return self.micro
        return max(1, min(self.micro, self.sizes(run_step) // (self.world * self.accumulate)))

    def _next(self, place: Place, run_step: int) -> Place:
        if self.sizes is None:
            size = self.micro * self.world * self.accumulate
            left = len(self.base) - place.used - size
            ended = left <= 0 or (self.drop_last and left < size)
            return Place(place.epoch + 1) if ended else Place(place.epoch, place.step + 1, place.used + size)
        used = place.used + self._micro(run_step) * self.world * self.accumulate
        left = len(self.base) - used
        size = self._micro(run_step + 1) * self.world * self.accumulate
        if left <= 0 or (self.drop_last and left < size):
            return Place(place.epoch + 1)
        return Place(place.epoch, place.step + 1, used)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    def order(self, epoch: int) -> list[Any]:
        """All samples in the order of `epoch`."""
        seed = derive_seed(self.seed, "order", epoch)
        with seeded(seed):
            for sampler in _nested(self.base):
                if getattr(sampler, "generator", None) is not None:
                    sampler.generator.manual_seed(seed)
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
            return list(self.base)

    def batch(self, place: Place, run_step: int, order: Sequence[Any]) -> Sequence[Any]:
        """The global batch of a step: the same on every rank and for every number of ranks."""
        size, count = self._micro(run_step) * self.world * self.accumulate, len(order)
        chosen: Sequence[Any] = order[place.used : place.used + size]
        if len(chosen) < size:
            chosen = [order[(place.used + i) % count] for i in range(size)]
        if self.select is not None:
            chosen = self.select(place.epoch, place.step, run_step, chosen)
        return chosen

    def __iter__(self) -> Iterator[list[Any]]:
        self._under_way.clear()
        run_step = self.position()
        place = first = self.place(run_step)
        order = self.order(place.epoch)
        remembers = self.remembers or self.targets is not None
        while place.epoch == first.epoch:
            batch = self.batch(place, run_step, order)
            micro = self.micro if self.sizes is None else self._micro(run_step)
            if remembers:
                self._remember(place, run_step, batch, micro)
            for part in range(self.accumulate):
                start = (part * self.world + self.rank) * micro
                yield self._keys(place.epoch, batch[start : start + micro])
            place, run_step = self._next(place, run_step), run_step + 1

    def _remember(self, place: Place, run_step: int, batch: Sequence[Any], micro: int) -> None:
        """Keep what this rank draws of a step, and drop what has been trained on."""
        done = (place.step - (run_step - self.position())) * self.accumulate
        for index in [index for index in self._under_way if index < done]:
            del self._under_way[index]
        for part in range(self.accumulate):
            start = (part * self.world + self.rank) * micro
            mine = batch[start : start + micro]
            drawn = Drawn(tuple(_flat(mine)), self._weight(mine, batch))
            self._under_way[place.step * self.accumulate + part] = drawn

    def _weight(self, mine: Sequence[Any], batch: Sequence[Any]) -> float | None:
        """The mean over k micro-batches of (n_i k / sum n) * mean_i is the mean over all targets."""
        if self.targets is None:
            return None
        share = self.targets[list(mine)].sum() / self.targets[list(batch)].sum()
        return float(share) * self.world * self.accumulate

    def drawn(self, batch_idx: int) -> Drawn | None:
        """The content of micro-batch `batch_idx` of an epoch, as Lightning counts them: of those of the step under way.

        Loader workers are ahead of training, so what they have drawn is kept until it has been trained on. None where
        nobody has set `remembers`.
        """
        return self._under_way.get(batch_idx)

    def weigh(self, batch: Any, batch_idx: int, device: torch.device) -> None:
        """Give a batch its `loss_weight`, where samples differ in their number of targets."""
        drawn = self.drawn(batch_idx)
        if drawn is not None and drawn.loss_weight is not None and isinstance(batch, MutableMapping):
            batch["loss_weight"] = torch.tensor(drawn.loss_weight, device=device)

    def _keys(self, epoch: int, units: Sequence[Any]) -> list[Any]:
        flat = _flat(units)
        if not self.keyed:
            return flat
        salt = derive_seed(self.seed, "sample", epoch)
        return [(i, (salt ^ (int(i) * 0x9E3779B97F4A7C15)) & 0x7FFFFFFFFFFFFFFF) for i in flat]


def _flat(units: Sequence[Any]) -> list[Any]:
    """Keys of samples; a unit is one, or a batch of them where the loader makes its own batches."""
    return [i for unit in units for i in unit] if units and isinstance(units[0], list | tuple) else list(units)


class EvenBatches(Sampler[list[int]]):
    """This rank's evaluation batches: every sample once, equally many batches on every rank, no batch above `micro`.

    Metrics summed over ranks are then exact. Only where there are fewer samples than batches, some are read twice.
    """

    def __init__(self, base: Any, *, micro: int, rank: int, world: int) -> None:
        self.base, self.micro, self.rank, self.world = base, micro, rank, world

    def __len__(self) -> int:
        return -(-len(self.base) // (self.micro * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order, parts = list(self.base), len(self) * self.world
        if len(order) < parts:
            order = (order * -(-parts // len(order)))[:parts]
        for batch in range(len(self)):
            part = batch * self.world + self.rank
            yield order[len(order) * part // parts : len(order) * (part + 1) // parts]


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


def _nested(sampler: Any) -> Iterator[Any]:
    """A sampler and those it draws from: a batch sampler holds the one that shuffles."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)


def reorder(loader: Any, *, training: bool, seed: int, trainer: pl.Trainer) -> Any:
    """`loader` with its batches taken from `GlobalBatches`; iterable loaders only learn to skip what is consumed."""
    if isinstance(loader, DataLoader):
        shield(loader)
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return _skipping(loader, trainer) if training else loader
    if isinstance(loader.dataset, IterableDataset):
        return _skipping(loader, trainer) if training else loader
    if isinstance(loader.batch_sampler, GlobalBatches | EvenBatches):
        return loader
    base, micro, drop_last = _base(loader)
    keyed = training and not (is_deterministic(loader.dataset) and collates_alike(loader))
    own_batches = type(loader.batch_sampler) is not BatchSampler
    if not training and not own_batches:
        even = EvenBatches(base, micro=micro, rank=trainer.global_rank, world=trainer.world_size)
        return _rebuilt(loader, loader.dataset, even, seed)
    batches = GlobalBatches(
        base,
        micro=micro,
        accumulate=trainer.accumulate_grad_batches if training else 1,
        rank=trainer.global_rank,
        world=trainer.world_size,
        seed=seed,
        position=(lambda: clock_of(trainer).step) if training else (lambda: 0),
        drop_last=drop_last and training,
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
    loader = trainer.fit_loop._data_source.instance
    return loader.batch_sampler if isinstance(getattr(loader, "batch_sampler", None), GlobalBatches) else None


def _reorder_all(loaders: Any, training: bool, seed: int, trainer: pl.Trainer) -> Any:
    if isinstance(loaders, DataLoader) or not isinstance(loaders, dict | list | tuple | CombinedLoader):
        return reorder(loaders, training=training, seed=seed, trainer=trainer)
    if training:
        return loaders
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    combined.flattened = [reorder(one, training=False, seed=seed, trainer=trainer) for one in combined.flattened]
    return combined
