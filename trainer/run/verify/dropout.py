"""Dropout whose masks belong to samples, not to the rank or the micro-batch that a sample happens to be in.

A run draws its masks from a generator of each rank, so another split of the same global batch has other masks, as good
as these. To compare splits, masks are drawn here for each sample, whoever reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....callbacks.sampling.seeding import reseed
from ....seeds import derive_seed


class SampleDropout:
    """Stands in for torch's dropout, in layers and called as a function, while a fit is under way.

    Every call draws one number from torch's CPU generator, which `begin` seeds by the step alone: it is the same for
    each micro-batch and rank, and again where a checkpointed layer is computed once more.

    Args:
        seed: Of the run.
        on: Whether masks are drawn; otherwise everything stays.

    Attributes:
        drawn: A mask was drawn.
        attention: Attention that drops probabilities inside one kernel was met; it dropped none.
    """

    def __init__(self, seed: int, on: bool) -> None:
        self.seed, self.on = seed, on
        self.drawn = self.attention = False
        self._samples: Sequence[int] = ()
        self._dropout, self._attention = functional.dropout, functional.scaled_dot_product_attention

    def begin(self, batch: Any, step: int, samples: Sequence[Any] = ()) -> None:
        """A micro-batch of optimizer step `step` is computed next: of these samples, where they are known."""
        first = _first(batch)
        alike = first is None or len(first) == len(samples)  # no technique has chosen among them
        self._samples = [_number(repr(key).encode()) for key in samples] if alike else by_content(first)
        reseed(derive_seed(self.seed, "verify", step))

    @contextmanager
    def in_force(self) -> Iterator[None]:
        functional.dropout, functional.scaled_dot_product_attention = self.dropout, self.scaled_dot_product_attention  # type: ignore[assignment]
        try:
            yield
        finally:
            functional.dropout, functional.scaled_dot_product_attention = self._dropout, self._attention

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0 or not self._samples:
            return self._dropout(input, p, training, inplace)
        if not self.on:
            return input
        self.drawn = True
        call = int(torch.randint(2**62, (1,)))
        count = len(self._samples)
        if input.shape[0] % count:  # not by samples: whoever splits the batch gets another mask
            return self._dropout(input, p, training, inplace)
        masks = [_drawn(call ^ key, input.numel() // count) >= p for key in self._samples]
        kept = torch.stack(masks).view(input.shape).to(input.device, input.dtype)
        return input * kept / (1 - p)

    def scaled_dot_product_attention(self, *args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        self.attention = self.attention or dropout_p > 0
        return self._attention(*args, **kwargs)


def by_content(batch: Tensor | None) -> list[int]:
    """A number for each row [B, …]."""
    if batch is None:
        return []
    rows = batch.detach().cpu().flatten(1)
    rows = rows.float() if rows.dtype == torch.bfloat16 else rows  # which numpy does not have
    return [_number(row.numpy().tobytes()) for row in rows]


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")


def _first(batch: Any) -> Tensor | None:
    """The first tensor [B, …] of a batch."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim > 1 and batch.numel() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((first for part in parts if (first := _first(part)) is not None), None)


def _drawn(seed: int, count: int) -> Tensor:
    """Numbers [count] from 0 to 1; more of them begin with the same ones."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
