"""What this attempt of a run spends: counted by every rank for itself, summed over ranks with a `Tally`."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch

from ..contract import Technique
from ..forward.training_step import wrapped_step
from .clock import Clock, Spend
from .energy import EnergyMeter, SteadyEnergy
from .flops import StepFlops
from .meter import Later, Windows, batch_size
from .tally import Tally


class Spending:
    """Counts samples, tokens, FLOPs, seconds, money and energy, and keeps them in `clock.spend`.

    Args:
        clock: whose `spend` is written here and nowhere else.
        usd_per_device_hour: the price of a device.
        watts_per_device: for energy where no counter can be read.
        count_flops: watch every new kind of step once; see `flops`.

    Attributes:
        trained_tokens: how many tokens of a batch carry loss [], or None; None: nobody says.
    """

    def __init__(
        self, clock: Clock, *, usd_per_device_hour: float, watts_per_device: float | None, count_flops: bool
    ) -> None:
        self.clock = clock
        self.usd_per_device_hour, self.watts_per_device = usd_per_device_hour, watts_per_device
        self.count_flops = count_flops
        self.trained_tokens: Callable[[Any], torch.Tensor | None] | None = None
        self.windows = Windows()
        self.mine = Tally()
        self.data_wait = 0.0
        self.world = 1
        self._before = Spend()  # of earlier attempts
        self._flops: StepFlops | None = None
        self._batch_ended = perf_counter()
        self._samples = self._positions = 0  # of the micro-batch under way
        self._tokens: int | Later = 0
        self._trained: Later | None = None
        self._lengths: Any = None

    def begin(self, startup_seconds: float = 0.0) -> None:
        """An attempt begins, which has spent nothing but what starting has taken."""
        self.windows, self.mine, self.data_wait = Windows(), Tally(), 0.0
        self.windows.seconds["startup"] = startup_seconds

    def open(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The fit has begun; nothing has been restored yet."""
        self.world = trainer.world_size
        self.energy = SteadyEnergy(EnergyMeter(self.watts_per_device, 1), self.windows.total())
        self._before = self.clock.spend
        self._flops = StepFlops(module, [c for c in trainer.callbacks if isinstance(c, Technique)])

    def start(self) -> None:
        """Training begins: what is restored by now was spent before."""
        self._before = Spend.from_dict(self.clock.spend.as_dict())

    def listen(self, module: pl.LightningModule) -> None:
        """Hear of samples that techniques choose, now that they have installed what chooses."""
        if (wrapped := wrapped_step(module)) is not None:
            wrapped.chosen = self.batch_chosen

    # -- batches ----------------------------------------------------------------------------------------------------
    def batch_arrives(self) -> None:
        """The loader has given a micro-batch, and no technique has seen it."""
        now = perf_counter()
        self.data_wait += now - self._batch_ended
        self._batch_ended = now  # a fetcher may fetch several before the first is trained on

    def batch_begins(self, batch: Any, steps: bool, lengths: Any = None) -> None:
        """A micro-batch, as techniques have left it, is about to run.

        steps: the optimizer steps after it. lengths: tokens of each of its rows [B], before any cut, on the CPU; None
        where its mask tells, or all of its positions are tokens.
        """
        self._lengths = lengths
        shape = self._count(batch, lengths)
        self.mine.samples += self._samples
        if self.count_flops and self._flops is not None:
            self._flops.begin(shape, steps)

    def batch_chosen(self, batch: Any, rows: torch.Tensor) -> None:
        """Only `batch`, the `rows` of the micro-batch, is trained on."""
        before = self._samples
        if self._lengths is not None:
            self._lengths = torch.as_tensor(self._lengths).to(rows.device, non_blocking=True)[rows]
        shape = self._count(batch, self._lengths)
        self.mine.samples += self._samples - before
        if self.count_flops and self._flops is not None:
            self._flops.chosen(shape)

    def _count(self, batch: Any, lengths: Any) -> tuple[int, ...]:
        """Samples, positions, tokens and trained ones of a batch; its shape. Nothing here waits for the device."""
        trained = self.trained_tokens(batch) if self.trained_tokens is not None else None
        self._trained = None if trained is None else Later(trained)
        self._samples, self._positions, shape, mask = batch_size(batch)
        self._tokens = self._positions
        if lengths is not None and len(shape) > 1:
            kept = lengths.clip(max=prod(shape[1:])).sum()
            self._tokens = Later(kept) if isinstance(kept, torch.Tensor) else int(kept)
        elif mask is not None:
            self._tokens = Later(mask.sum())
        return shape

    def batch_ends(self) -> None:
        """It has run, and the optimizer has stepped where it was to."""
        tokens = self._tokens if isinstance(self._tokens, int) else self._tokens.read()
        self.mine.tokens += tokens
        self.mine.padding += self._positions - tokens
        self.mine.trained_tokens += 0 if self._trained is None else self._trained.read()
        if self.count_flops and self._flops is not None:
            flops = self._flops.end()
            self.mine.flops_counted += flops.counted
            self.mine.flops_realised += flops.realised

    def wait_for_data(self) -> None:
        """From now on the loop waits for the next batch."""
        self._batch_ended = perf_counter()

    # -- totals -----------------------------------------------------------------------------------------------------
    def refresh(self, *, exact: bool = False) -> None:
        """Bring what this process measures itself up to now; energy `exact`ly, or as last known."""
        spend, before = self.clock.spend, self._before
        elapsed = self.windows.total()
        spend.steps = self.clock.step
        spend.seconds = before.seconds + elapsed
        spend.device_seconds = before.device_seconds + elapsed * self.world
        spend.usd = before.usd + elapsed * self.world * self.usd_per_device_hour / 3600
        self.mine.joules = self.energy.at(elapsed, exact=exact)

    def receive(self, total: Tally) -> None:
        """The sums over all ranks."""
        spend, before = self.clock.spend, self._before
        spend.samples = before.samples + total.samples
        spend.tokens = before.tokens + total.tokens
        spend.padding = before.padding + total.padding
        spend.trained_tokens = before.trained_tokens + total.trained_tokens
        spend.flops_counted = before.flops_counted + total.flops_counted
        spend.flops = before.flops + total.flops_realised
        spend.kwh = before.kwh + total.joules / 3.6e6

    def this_attempt(self) -> Spend:
        """Return the spend of this attempt."""
        return self.clock.spend.minus(self._before)

    # -- the model ---------------------------------------------------------------------------------------------------
    def reshaped(self) -> None:
        """The model has other shapes now: its steps are watched anew."""
        if self._flops is not None:
            self._flops.forget()

    def abort(self) -> None:
        """A step has failed in the middle."""
        if self._flops is not None:
            self._flops.abort()
