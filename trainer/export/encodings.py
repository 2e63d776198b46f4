"""Smaller spellings of weights: int8 and int4 values with scales, and the kept values of a sparse tensor with a mask.

Pure functions, tensor in, tensor out. Each encoding has its exact inverse: unpacking gives back what was packed, bit
for bit, and quantizing what was dequantized gives the same integers. The grids are those of training with
low-bit weights.

    int8      one scale per row of `axis`: 1 byte a weight, error at most half a scale
    product   int8 as the weights of int8 matrix products have it: within 7 bits, where any CPU is to compute them
    int4      one float16 scale per 32 neighbours of a row: 4.5 bits a weight
    grid      the grid that quantization-aware training has laid over a weight: its bits, a float32 scale per group
    codebook  the few values that clustered weights share: 1, 2, 4 or 8 bits a weight and the values
    sparse    one bit a weight and the kept values: d * b + 1 bits at density d and b-bit values
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ... import ShoestringError
from ...callbacks.compression.codebooks import LARGEST
from ...callbacks.compression.fake_quantization import OffGrid, codes, highest, scales, values

GROUP = 32  # neighbours that share an int4 scale


class CannotEncode(ShoestringError):
    """A tensor has values that the encoding cannot hold."""


# -- int8, a scale per output channel --------------------------------------------------------------------------------
def quantize_int8(weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """(int8 values, shaped like `weight`; float32 scales, one per index of `axis`, shaped to broadcast).

    Symmetric, round to nearest even: `scale = max|w| / 127`. `axis` is the output channel: 0 of linear, convolution and
    embedding weights, 1 of transformers' Conv1D. A row of zeros has scale 1.
    """
    return quantize_product(weight, axis, 8)


def dequantize_int8(values: Tensor, scale: Tensor) -> Tensor:
    """Float32 weights from `quantize_int8`."""
    return values.float() * scale


def quantize_product(weight: Tensor, axis: int, bits: int, on_grid: bool = False) -> tuple[Tensor, Tensor]:
    """As `quantize_int8`, with codes of `bits` bits: for int8 matrix products, see `PRODUCT_BITS`.

    on_grid: rows that lie on a grid of so many bits, whatever its steps, keep it exactly, which takes 2^(bits-1) passes
    over the weight. Where a row lies on none, all are rounded by their largest magnitudes.
    """
    rows = _finite(weight).movedim(axis, 0)
    try:
        steps = scales(rows, bits, None, "lsq" if on_grid else "absmax")
    except OffGrid:
        steps = scales(rows, bits)
    return codes(rows, steps, bits).movedim(0, axis), steps.view([-1 if d == axis else 1 for d in range(rows.ndim)])


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


# -- what training has made of a weight ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Grid:
    """The grid of `quantization_aware`, with its settings: 2 to 8 bits, inputs per scale (None: a row), rule of scales.

    codes, steps: the weight's nearest levels, int8, shaped like it; and float32 [out, groups, 1].
    """

    bits: int
    group: int | None
    rule: str

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        steps = scales(_finite(weight), self.bits, self.group, self.rule)
        return codes(weight, steps, self.bits), steps

    def rounded(self, weight: Tensor) -> Tensor:
        return values(*self.encode(weight), weight.dtype)


@dataclass(frozen=True)
class Codebook:
    """The codebook of `weight_clustering`: a weight has no more than 256 distinct values."""

    def values(self, weight: Tensor) -> Tensor:
        """They, ascending."""
        distinct = _finite(weight).unique()
        if len(distinct) > LARGEST:
            raise CannotEncode(f"{len(distinct)} distinct values, where a codebook has at most {LARGEST}")
        return distinct

    def rounded(self, weight: Tensor) -> Tensor:
        return weight.detach()


# -- low-bit integers ---------------------------------------------------------------------------------------------
def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers of `bits` bits (two's complement) as uint8 [ceil(n * bits / 8)], one after another, lowest bit first."""
    each = values.flatten().to(torch.uint8).cpu().numpy()[:, None] >> np.arange(bits, dtype=np.uint8) & 1
    return torch.from_numpy(np.packbits(each, bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers (int8, flat) that `pack_bits` packed."""
    each = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    worth = np.array([*(2**place for place in range(bits - 1)), -(2 ** (bits - 1))], dtype=np.int8)
    return torch.from_numpy(each.view(np.int8) @ worth)


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


def sparse_pays(values: Tensor, bits: int | None = None) -> bool:
    """Whether mask and kept values take fewer bytes than all values; bits: of a value, where they are to be packed."""
    bits = bits or 8 * values.element_size()
    kept, size = int((values != 0).sum()), values.numel()
    return -(-kept * bits // 8) + -(-size // 8) < -(-size * bits // 8)


def _finite(weight: Tensor) -> Tensor:
    values = weight.detach().float()
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CannotEncode(f"{bad} of {values.numel()} weights are NaN or infinite: nothing to quantize.")
    return values
