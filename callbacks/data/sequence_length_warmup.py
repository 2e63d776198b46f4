"""Sequence-length warmup: short sequences first, full length later (arXiv 2108.06084)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
import torch

from ..accounting.clock import Duration, clock_of
from ..contract import Card, Effect, IncompatibleTechniques, Technique, Workload, require
from ..sampling.global_batches import GlobalBatches
from ..sampling.samples import order_of


def length_at(ramp: float, start: int, full: int, multiple: int) -> int:
    """Sequence length after `ramp` in [0, 1] of the warmup: linear, rounded down to a multiple, never below it."""
    if ramp >= 1.0 or start >= full:
        return full
    length = start + ramp * (full - start)
    return min(full, max(multiple, int(length // multiple) * multiple))


def truncate(batch: MutableMapping[str, Any], length: int) -> None:
    """Cut dimension 1 of every [B, T, …] tensor that is as long as `input_ids`, in place."""
    full = batch["input_ids"].shape[1]
    if length >= full:
        return
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[1] == full:
            batch[key] = value[:, :length].contiguous()


def longest_row(order: GlobalBatches) -> int | None:
    """Tokens of the longest row of the data; None where all have as many, or nobody knows.

    All micro-batches are then cut alike, whatever each one's own longest row is.
    """
    if order.lengths is not None:
        return int(order.lengths.max())
    return None if order.targets is None else int(order.targets.max()) + 1


@dataclass(kw_only=True, eq=False, repr=False)
class SequenceLengthWarmup(Technique, pl.Callback):
    """Train on the first `start` tokens of every sequence, growing linearly to the whole over `until`.

    Batches are mappings with `input_ids` [B, T]; every tensor [B, T, …] in them is cut alike. What is cut off is not
    seen in this pass.

    Source: arXiv 2108.06084.

    Args:
        start: Tokens of a sequence at first.
        until: Duration after which sequences are whole, such as "30%" or "500 steps".
        multiple: Lengths are multiples of this many tokens, so kernels stay fast and few shapes occur.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import SequenceLengthWarmup
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[SequenceLengthWarmup(start=64, until="30%")])
        >>> length_at(0.5, start=64, full=512, multiple=8)  # tokens, half-way to `until`
        288
    """

    card = Card(
        name="sequence_length_warmup",
        does="starts with short sequences and grows them to full length",
        paper="2108.06084",
        saves={"flops", "time", "memory"},
        writes={"batch"},
    )

    start: int = 64
    until: str = "30%"
    multiple: int = 8

    def check(self) -> None:
        require(self.start > 0, self, "start", "a positive number of tokens")
        require(self.multiple > 0, self, "multiple", "a positive number of tokens")
        Duration.parse(self.until)

    def predict(self, workload: Workload) -> Effect:
        until = Duration.parse(self.until)
        share = until.amount if until.counts == "progress" else min(1.0, until.amount / max(1, workload.steps))
        mean = (min(self.start, workload.sequence_length) / workload.sequence_length + 1) / 2
        return Effect(flops=1 - share * (1 - mean))

    @classmethod
    def example(cls) -> Self:
        return cls(start=8, until="60%", multiple=4)

    @classmethod
    def noop(cls) -> Self:
        return cls(until="0%")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._until = Duration.parse(self.until)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._order = order_of(trainer)
        self._full = None if self._order is None else longest_row(self._order)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        ramp = clock_of(trainer).toward(self._until)
        if self._order is not None:
            self._order.kept_tokens = None
        if ramp >= 1.0:
            return
        if not isinstance(batch, MutableMapping) or "input_ids" not in batch:
            raise IncompatibleTechniques(
                f"sequence_length_warmup needs batches with 'input_ids'; this one is a {type(batch).__name__}"
            )
        length = length_at(ramp, self.start, self._full or batch["input_ids"].shape[1], self.multiple)
        if self._order is not None:
            self._order.kept_tokens = length
        truncate(batch, length)
