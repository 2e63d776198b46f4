"""Which samples each global batch holds, on every rank, at every step.

The order is a pure function of (seed, epoch) and the position of the optimizer step, never of the number of ranks or
of what was run before. So resuming skips in O(1), mid-epoch, with loader workers; and a run that resumes on another
number of ranks sees the same global batches. An epoch is a whole number of global batches: the last one is filled up
from the start of the same epoch's order (as `DistributedSampler` pads), or dropped where the loader says `drop_last`.

Where rows are padded to the longest of their batch, samples of alike lengths share one: see `grouping.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from ...seeds import derive_seed
from .grouping import group_by_length, longest_first
from .seeding import seeded

# (epoch, step in the epoch, step of the run, the samples that would be taken) -> the samples to take
Select = Callable[[int, int, int, Sequence[int]], Sequence[int]]
# step of the run -> samples of its global batch; see `GlobalBatches.sizes`
Sizes = Callable[[int], int]


@dataclass(frozen=True)
class Drawn:
    """One micro-batch of this rank.

    samples: their keys in the data set, in the order of the batch's rows. everybodys: those of the global batch, all
    ranks' and micro-batches'.
    """

    samples: tuple[Any, ...]
    everybodys: Sequence[Any]


@dataclass(slots=True)
class Place:
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
    number of steps. One that cuts rows says in `kept_tokens` how many tokens of each it keeps in the step under way.
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
        self.global_batch = micro * world * accumulate
        self.seed, self.position, self.drop_last, self.keyed = seed, position, drop_last, keyed
        self.select: Select | None = None
        self.sizes: Sizes | None = None
        self.targets: Any = None  # how many targets each sample has, where that differs
        self.lengths: Any = None  # how many tokens each sample has, where that differs
        self.grouped = False  # samples of alike lengths share a batch
        self.kept_tokens: int | None = None  # of a row; None: all
        self.most_steps: int | None = None  # of an epoch, where it ends before its data does
        self.since = 0, 0  # a step of the run, and the epoch that began there
        self.remembers = False  # set it in `on_fit_start` to ask for `drawn`
        self._under_way: dict[int, Drawn] = {}  # by micro-batch of the epoch

    @property
    def steps_per_epoch(self) -> int:
        """The steps of the epoch that the run is in, where they differ."""
        whole = self._whole_steps()
        return whole if self.most_steps is None else min(whole, self.most_steps)

    def _whole_steps(self) -> int:
        """The steps of an epoch that ends with its data."""
        samples = len(self.base)
        if self.sizes is not None:
            run_step = self.position()
            place = self.place(run_step)
            while not self._is_last(place, run_step, samples):
                place, run_step = self._next(place, run_step, samples), run_step + 1
            return place.step + 1
        whole, rest = divmod(samples, self.global_batch)
        return whole if self.drop_last and whole else whole + bool(rest)

    def place(self, position: int) -> Place:
        """Return where optimizer step `position` of the run begins."""
        begun, epoch = self.since if position >= self.since[0] else (0, 0)
        if self.sizes is None:
            more, step = divmod(position - begun, self.steps_per_epoch)
            return Place(epoch + more, step, step * self.global_batch)
        place, samples = Place(epoch), len(self.base)
        for step in range(begun, position):
            place = self._next(place, step, samples)
        return place

    def begin_epoch(self, epoch: int) -> None:
        """Epoch `epoch` begins at this step of the run, whether the one before it was read to its end or not."""
        position = self.position()
        if position != self.since[0]:
            self.since = position, epoch

    def with_data_of(self, other: GlobalBatches) -> GlobalBatches:
        """This order, over the data that `other` has been made for."""
        for name in ("base", "micro", "accumulate", "global_batch", "drop_last", "keyed", "targets", "most_steps"):
            setattr(self, name, getattr(other, name))
        return self

    def _size(self, run_step: int) -> int:
        """Samples of the global batch at a step of the run: as many for each rank and micro-batch."""
        if self.sizes is None:
            return self.global_batch
        parts = self.world * self.accumulate
        return parts * max(1, min(self.micro, self.sizes(run_step) // parts))

    def _is_last(self, place: Place, run_step: int, samples: int) -> bool:
        """Whether the data of an epoch end with the step at `place`."""
        left = samples - place.used - self._size(run_step)
        return left <= 0 or (self.drop_last and left < self._size(run_step + 1))

    def _next(self, place: Place, run_step: int, samples: int) -> Place:
        """Where the step after `run_step` begins, in an order of so many samples."""
        if self._is_last(place, run_step, samples) or place.step + 1 == self.most_steps:
            return Place(place.epoch + 1)
        return Place(place.epoch, place.step + 1, place.used + self._size(run_step))

    def __len__(self) -> int:
        return self._whole_steps() * self.accumulate

    def order(self, epoch: int) -> list[Any]:
        """All samples in the order of `epoch`."""
        seed = derive_seed(self.seed, "order", epoch)
        with seeded(seed):
            for sampler in nested(self.base):
                if getattr(sampler, "generator", None) is not None:
                    sampler.generator.manual_seed(seed)
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
            order = list(self.base)
        return group_by_length(order, self.lengths, self.global_batch, seed) if self.grouped else order

    def batch(self, place: Place, run_step: int, order: Sequence[Any]) -> Sequence[Any]:
        """The global batch of a step: the same on every rank and for every number of ranks."""
        size, count = self._size(run_step), len(order)
        chosen: Sequence[Any] = order[place.used : place.used + size]
        if len(chosen) < size:
            chosen = [order[(place.used + i) % count] for i in range(size)]
        if self.select is not None:
            chosen = self.select(place.epoch, place.step, run_step, chosen)
        # each micro-batch takes neighbours
        return longest_first(chosen, self.lengths) if self.grouped else chosen

    def __iter__(self) -> Iterator[list[Any]]:
        self._under_way.clear()
        run_step = self.position()
        place = first = self.place(run_step)
        order = self.order(place.epoch)
        remembers = self.remembers or self.targets is not None or self.lengths is not None
        while place.epoch == first.epoch:
            batch = self.batch(place, run_step, order)
            micro = len(batch) // (self.world * self.accumulate)
            if remembers:
                self._forget(place.step - (run_step - self.position()))
            for part in range(self.accumulate):
                start = (part * self.world + self.rank) * micro
                mine = batch[start : start + micro]
                samples = _flat(mine)
                if remembers:
                    self._under_way[place.step * self.accumulate + part] = Drawn(tuple(samples), batch)
                yield self._with_keys(place.epoch, samples) if self.keyed else samples
            place, run_step = self._next(place, run_step, len(order)), run_step + 1

    def _forget(self, step: int) -> None:
        """Drop what was drawn for steps of the epoch before `step`: they are done."""
        for index in [index for index in self._under_way if index < step * self.accumulate]:
            del self._under_way[index]

    def drawn(self, batch_idx: int) -> Drawn | None:
        """The content of micro-batch `batch_idx` of an epoch, as Lightning counts them: of those of the step under way.

        Loader workers are ahead of training, so what they have drawn is kept until it has been trained on. None where
        nobody has set `remembers`.
        """
        return self._under_way.get(batch_idx)

    def weigh(self, batch: Any, batch_idx: int, device: torch.device) -> None:
        """Give a batch its `loss_weight`, where samples differ in their number of targets.

        The mean over k micro-batches of (n_i k / sum n) * mean_i is the mean over all targets of the global batch. In a
        row of which only the first tokens are kept, all but the first of those are targets.
        """
        drawn = self._under_way.get(batch_idx)
        if drawn is None or not isinstance(batch, MutableMapping):
            return
        mine, everybodys = self.targets[list(drawn.samples)], self.targets[list(drawn.everybodys)]
        if self.kept_tokens is not None:
            mine, everybodys = mine.clip(max=self.kept_tokens - 1), everybodys.clip(max=self.kept_tokens - 1)
        share = float(mine.sum() / everybodys.sum())
        batch["loss_weight"] = torch.tensor(share * self.world * self.accumulate, device=device)

    def row_lengths(self, batch_idx: int) -> Any:
        """Tokens of each row of a micro-batch [m], before any cut; None where all have as many, or nobody knows."""
        drawn = None if self.lengths is None else self._under_way.get(batch_idx)
        return None if drawn is None else self.lengths[list(drawn.samples)]

    def _with_keys(self, epoch: int, samples: Sequence[Any]) -> list[Any]:
        """Samples with what seeds their augmentation."""
        salt = derive_seed(self.seed, "sample", epoch)
        return [(i, (salt ^ (int(i) * 0x9E3779B97F4A7C15)) & 0x7FFFFFFFFFFFFFFF) for i in samples]


def _flat(units: Sequence[Any]) -> list[Any]:
    """Keys of samples; a unit is one, or a batch of them where the loader makes its own batches."""
    return [i for unit in units for i in unit] if units and isinstance(units[0], list | tuple) else list(units)


def nested(sampler: Any) -> Iterator[Any]:
    """A sampler and those it draws from: a batch sampler holds the one that shuffles."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)
