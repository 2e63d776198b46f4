"""Which samples each global batch holds, on every rank, at every step.

The order is a pure function of (seed, epoch) and the position of the optimizer step, never of the number of ranks or
of what was run before. So resuming skips in O(1), mid-epoch, with loader workers; and a run that resumes on another
number of ranks sees the same global batches. An epoch is a whole number of global batches: the last one is filled up
from the start of the same epoch's order (as `DistributedSampler` pads), or dropped where the loader says `drop_last`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from ...seeds import derive_seed
from .seeding import seeded

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
        self.global_batch = micro * world * accumulate
        self.seed, self.position, self.drop_last, self.keyed = seed, position, drop_last, keyed
        self.select: Select | None = None
        self.sizes: Sizes | None = None
        self.targets: Any = None  # how many targets each sample has, where that differs
        self.remembers = False  # set it in `on_fit_start` to ask for `drawn`
        self._under_way: dict[int, Drawn] = {}  # by micro-batch of the epoch

    @property
    def steps_per_epoch(self) -> int:
        """The steps of the epoch that the run is in, where they differ."""
        if self.sizes is not None:
            run_step = self.position()
            place = self.place(run_step)
            samples = len(self.base)
            while (following := self._next(place, run_step, samples)).epoch == place.epoch:
                place, run_step = following, run_step + 1
            return place.step + 1
        whole, rest = divmod(len(self.base), self.global_batch)
        return whole if self.drop_last and whole else whole + bool(rest)

    def place(self, position: int) -> Place:
        """Return where optimizer step `position` of the run begins."""
        if self.sizes is None:
            epoch, step = divmod(position, self.steps_per_epoch)
            return Place(epoch, step, step * self.global_batch)
        place, samples = Place(), len(self.base)
        for step in range(position):
            place = self._next(place, step, samples)
        return place

    def _size(self, run_step: int) -> int:
        """Samples of the global batch at a step of the run: as many for each rank and micro-batch."""
        if self.sizes is None:
            return self.global_batch
        parts = self.world * self.accumulate
        return parts * max(1, min(self.micro, self.sizes(run_step) // parts))

    def _next(self, place: Place, run_step: int, samples: int) -> Place:
        """Where the step after `run_step` begins, in an order of so many samples."""
        used = place.used + self._size(run_step)
        left = samples - used
        if left <= 0 or (self.drop_last and left < self._size(run_step + 1)):
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
        size, count = self._size(run_step), len(order)
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
            micro = len(batch) // (self.world * self.accumulate)
            if remembers:
                self._forget(place.step - (run_step - self.position()))
            for part in range(self.accumulate):
                start = (part * self.world + self.rank) * micro
                mine = batch[start : start + micro]
                samples = _flat(mine)
                if remembers:
                    drawn = Drawn(tuple(samples), self._weight(mine, batch))
                    self._under_way[place.step * self.accumulate + part] = drawn
                yield self._with_keys(place.epoch, samples) if self.keyed else samples
            place, run_step = self._next(place, run_step, len(order)), run_step + 1

    def _forget(self, step: int) -> None:
        """Drop what was drawn for steps of the epoch before `step`: they are done."""
        for index in [index for index in self._under_way if index < step * self.accumulate]:
            del self._under_way[index]

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

    def _with_keys(self, epoch: int, samples: Sequence[Any]) -> list[Any]:
        """Samples with what seeds their augmentation."""
        salt = derive_seed(self.seed, "sample", epoch)
        return [(i, (salt ^ (int(i) * 0x9E3779B97F4A7C15)) & 0x7FFFFFFFFFFFFFFF) for i in samples]


def _flat(units: Sequence[Any]) -> list[Any]:
    """Keys of samples; a unit is one, or a batch of them where the loader makes its own batches."""
    return [i for unit in units for i in unit] if units and isinstance(units[0], list | tuple) else list(units)


def _nested(sampler: Any) -> Iterator[Any]:
    """A sampler and those it draws from: a batch sampler holds the one that shuffles."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)
