"""Which positions of a batch are distilled, and what a sample is called in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..forward.model_calls import Call
from .distillation_losses import target_mask
from .logit_cache import lengths_of, sample_keys


@dataclass(frozen=True)
class TargetPositions:
    """The positions of logits [B, …, C] that count; `mask` [B, T] where not all do."""

    mask: Tensor | None
    shape: torch.Size
    device: torch.device

    @property
    def counts(self) -> list[int]:
        """The number of positions of each sample [B]. Waits for the device where there is a mask."""
        if self.mask is not None:
            return self.mask.sum(1).tolist()
        return [self.shape[1:-1].numel()] * self.shape[0]

    def rows(self, logits: Tensor) -> Tensor:
        """All positions, [B * …, C] of [B, …, C]."""
        if logits.shape[:-1] != self.shape[:-1]:
            raise ValueError(f"logits {tuple(logits.shape)} do not go with the student's {tuple(self.shape)}")
        return logits.flatten(0, -2)

    def select(self, logits: Tensor) -> Tensor:
        """Those that count, [N, C] of [B, …, C], sample by sample. Waits for the device where there is a mask."""
        return self.rows(logits) if self.mask is None else self.rows(logits)[self.mask.flatten()]


def target_positions(call: Call, logits: Tensor, batch: Any, shift: bool) -> TargetPositions:
    """For sequences [B, T, C]: where `labels` [B, T] are predicted, else where `attention_mask` is set, else all."""
    mask = None
    if logits.ndim == 3:
        given = {**_tensors(batch), **_tensors(call.kwargs)}
        for name in ("labels", "attention_mask"):
            tensor = given.get(name)
            if tensor is not None and tensor.shape == logits.shape[:2]:
                mask = target_mask(tensor, shift=shift) if name == "labels" else tensor.bool()
                break
    return TargetPositions(mask, logits.shape, logits.device)


def cache_keys(call: Call, at: TargetPositions, *, causal: bool) -> list[bytes]:
    """A key for every sample: a hash of the inputs up to the sample's end, and of the positions that count.

    The end is that of `attention_mask`; without one, a causal model's last position that counts, since it sees nothing
    behind it. Whatever else sees its padding, so there the padding is part of the key.
    """
    inputs = [(f"{i} {name}", t) for i, arg in enumerate(call.args) for name, t in _tensors({"": arg}).items()]
    inputs += _tensors(call.kwargs).items()
    width, lengths = at.shape[1], None
    padding = dict(inputs).get("attention_mask")
    if padding is not None and padding.ndim == 2:
        width, lengths = padding.shape[1], lengths_of(padding.bool())
    elif at.mask is not None and causal:
        lengths = lengths_of(at.mask)
    if at.mask is not None:
        inputs = [(name, tensor) for name, tensor in inputs if name != "labels"] + [("positions", at.mask)]
    return sample_keys(inputs, lengths, width)


def _tensors(values: Any) -> dict[str, Tensor]:
    """The tensors of a mapping by name, those of mappings in it too."""
    tensors: dict[str, Tensor] = {}
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Tensor) and value.ndim:
            tensors[str(name)] = value
        elif isinstance(value, Mapping):
            tensors |= _tensors(value)
    return tensors
