"""Smaller spellings of weights: int8 and int4 values with scales, and the kept values of a sparse tensor with a mask.

Pure functions, tensor in, tensor out. Each encoding has its exact inverse: unpacking gives back what was packed, bit
for bit, and quantizing what was dequantized gives the same integers. The grids are those of training for few bits.

    int8    one scale per row of `axis`: 1 byte a weight, error at most half a scale
    int4    one float16 scale per 32 neighbours of a row: 4.5 bits a weight
    sparse  one bit a weight and the kept values: d * b + 1 bits at density d and b-bit values
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ... import ShoestringError
from ...callbacks.compression.fake_quantization import codes, highest, scales

GROUP = 32  # neighbours that share an int4 scale


class CannotEncode(ShoestringError):
    """A tensor has values that the encoding cannot hold."""


# -- int8, a scale per output channel --------------------------------------------------------------------------------
def quantize_int8(weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """(int8 values, shaped like `weight`; float32 scales, one per index of `axis`, shaped to broadcast).

    Symmetric, round to nearest even: `scale = max|w| / 127`. `axis` is the output channel: 0 of linear, convolution and
    embedding weights, 1 of transformers' Conv1D. A row of zeros has scale 1.
    """
    found = _finite(weight).movedim(axis, 0)
    steps = scales(found, 8)
    shape = [-1 if dim == axis else 1 for dim in range(found.ndim)]
    return codes(found, steps, 8).movedim(0, axis), steps.view(shape)


def dequantize_int8(values: Tensor, scale: Tensor) -> Tensor:
    """Float32 weights from `quantize_int8`."""
    return values.float() * scale


# -- int4, a scale per group -----------------------------------------------------------------------------------------
def quantize_int4(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """(values from -7 to 7 as int8 [groups, group]; float16 scales [groups, 1]).

    Groups run along the flattened tensor; the last one is filled up with zeros. A scale too small for float16 makes its
    group zero; one too large is an error.
    """
    flat = _finite(weight).flatten()
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % group)).view(-1, group)
    scale = (rows.abs().amax(1, keepdim=True) / highest(4)).half()
    if not torch.isfinite(scale).all():
        raise CannotEncode(f"int4: magnitudes up to {flat.abs().max():.3g} have no float16 scale. Use int8.")
    divisor = torch.where(scale > 0, scale.float(), torch.ones_like(rows[:, :1]))
    return codes(rows, divisor[:, None], 4) * (scale > 0), scale


def dequantize_int4(values: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Float32 weights of `shape` from `quantize_int4`."""
    return (values.float() * scale.float()).flatten()[: int(np.prod(shape))].view(shape)


def pack_nibbles(values: Tensor) -> Tensor:
    """Integers from -8 to 7, two to a byte (uint8), the first in the low half; an odd one out gets a 0 beside it."""
    flat = torch.nn.functional.pad(values.flatten().to(torch.int16), (0, values.numel() % 2)) & 0xF
    return (flat[0::2] | flat[1::2] << 4).to(torch.uint8)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The first `count` integers (int8, flat) that `pack_nibbles` packed."""
    wide = packed.to(torch.int16)
    flat = torch.stack([wide & 0xF, wide >> 4], 1).flatten()[:count]
    return torch.where(flat > highest(4), flat - 16, flat).to(torch.int8)


# -- masks -----------------------------------------------------------------------------------------------------------
def pack_mask(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as uint8, eight to a byte, the first in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of `shape` that `pack_mask` packed."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little")).view(shape).bool()


def encode_sparse(values: Tensor) -> tuple[Tensor, Tensor]:
    """(packed mask of what is not 0, those values in order, flat). A pruned weight of -0.0 comes back as 0.0."""
    mask = values != 0
    return pack_mask(mask), values[mask]


def decode_sparse(packed: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of `shape` that `encode_sparse` encoded, in the dtype of `kept`."""
    return torch.zeros(shape, dtype=kept.dtype).masked_scatter_(unpack_mask(packed, shape), kept)


def sparse_pays(values: Tensor) -> bool:
    """Whether mask and kept values take fewer bytes than all values."""
    kept = int((values != 0).sum())
    return kept * values.element_size() + -(-values.numel() // 8) < values.numel() * values.element_size()


def _finite(weight: Tensor) -> Tensor:
    found = weight.detach().float()
    if not torch.isfinite(found).all():
        bad = int((~torch.isfinite(found)).sum())
        raise CannotEncode(f"{bad} of {found.numel()} weights are NaN or infinite: nothing to quantize.")
    return found
