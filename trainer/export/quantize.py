"""A trained model with its weights in 2 to 8 bits, for inference: after quantization-aware training or without it.

What each combination is on a CPU:
  weight_bits 2-8, activation_bits 8     int8 matrix products, fast with VNNI: torchao's kernel under `torch.compile`,
                                         or ONNX Runtime (`onnx_file`), which is the faster one. One byte a weight,
                                         of which 7 bits are used, or with cpu="vnni" all 8.
  weight_bits 2-8, activation_bits None  emulation, for accuracy studies: every forward turns the codes back into floats
                                         and multiplies those, which is slower than the float model, never faster.
                                         torchao stores one byte a weight; the bits themselves are not packed.
The grids are those of `callbacks.compression.fake_quantization`, so a model that was trained on them computes the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ... import ShoestringError
from ...callbacks.compression.fake_quantization import (
    SCALES,
    OffGrid,
    check_groups,
    codes,
    product_bits,
    quantized,
    scales,
)
from ...callbacks.parameters.layers import quantizable

INSTALL = "pip install 'torchao>=0.18'"


class CannotQuantize(ShoestringError):
    """No kernel for this combination, or nothing to quantize."""


def quantize(
    model: nn.Module,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    group_size: int | None = None,
    *,
    cpu: str = "any",
    scale: str = "absmax",
    skip: Sequence[str] = (),
    embeddings: bool = False,
    compiled: bool = True,
) -> nn.Module:
    """A quantized copy of `model`, in eval mode; `model` stays as it is. No calibration is needed.

    activation_bits: 8 quantizes what enters linear layers, one scale per token at run time; None leaves it.
    cpu, group_size, scale, skip: as in the technique `quantization_aware`; the int8 product has one scale per output
    channel. "lsq" finds the grid on which that technique has left the weights, which must still be in float32.
    embeddings: their tables too, 8 bits with one scale per row. compiled: wrap in `torch.compile` where the int8 kernel
    needs it to be fast; each new input shape compiles anew.
    Raises `CannotQuantize` for what no kernel computes.
    """
    _check(weight_bits, activation_bits, group_size, scale)
    weight_bits = weight_bits if activation_bits is None else product_bits(weight_bits, cpu)
    served = copy.deepcopy(model).eval().requires_grad_(False)
    layers = quantizable(served, skip)
    if not layers and not embeddings:
        raise CannotQuantize(f"nothing to quantize: no linear or convolution layer is left after skip={list(skip)}")
    for name, used in layers.items():
        weight = used[0].module.weight
        assert isinstance(weight, Tensor)
        with _named(name):
            if any(isinstance(each.module, nn.Linear) for each in used) and activation_bits == 8:
                stored = _int8(weight, weight_bits, scale)
            else:
                stored = _weight_only(name, weight, weight_bits, group_size, scale)
        shared = nn.Parameter(stored, requires_grad=False)
        for each in used:
            each.module.weight = shared
    if embeddings:
        quantize_embeddings(served)
    if compiled and activation_bits == 8:
        # keep the int32 product and its scales in one kernel
        return torch.compile(served, options={"force_fuse_int_mm_with_mul": True, "epilogue_fusion": True})  # type: ignore[return-value]
    return served


def bake(
    model: nn.Module,
    weight_bits: int,
    group_size: int | None = None,
    *,
    scale: str = "absmax",
    skip: Sequence[str] = (),
) -> list[str]:
    """Round the weights of `model` to their grid, in place and still as floats; returns their names.

    What the layers of a model trained with `quantization_aware` saw becomes what they are.
    """
    _check(weight_bits, None, group_size, scale)
    layers = quantizable(model, skip)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in layers:
            check_groups(parameters[name].shape, group_size, name)
            with _named(name):
                parameters[name].copy_(quantized(parameters[name], weight_bits, group_size, scale))
    return list(layers)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which layer the weights are on no grid."""
    try:
        yield
    except OffGrid as error:
        raise CannotQuantize(f"{name}: {error}") from None


class Int8Embedding(nn.Module):
    """An embedding table stored in 8 bits, one scale per row; only the rows looked up are turned into floats."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        steps = scales(table, 8)
        self.register_buffer("codes", codes(table, steps, 8))
        self.register_buffer("steps", steps.view(-1, 1).to(table.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = nn.functional.embedding(ids, self.codes)  # type: ignore[arg-type]
        steps: Tensor = nn.functional.embedding(ids, self.steps)  # type: ignore[arg-type]
        return rows.to(steps.dtype) * steps


def quantize_embeddings(model: nn.Module) -> None:
    """Replace, in place, every plain embedding whose table no other layer uses."""
    owners: dict[int, int] = {}
    for layer in model.modules():
        for p in layer._parameters.values():
            if p is not None:
                owners[id(p)] = owners.get(id(p), 0) + 1
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Embedding and owners[id(child.weight)] == 1 and child.max_norm is None:
                setattr(parent, name, Int8Embedding(child.weight.detach()))


def _check(weight_bits: int, activation_bits: int | None, group_size: int | None, scale: str) -> None:
    if weight_bits not in range(2, 9):
        raise CannotQuantize(f"weight_bits={weight_bits!r} is not allowed; use 2 to 8")
    if activation_bits not in (None, 8):
        raise CannotQuantize(f"activation_bits={activation_bits!r} is not allowed; use 8, or None for floats")
    if scale not in SCALES:
        raise CannotQuantize(f"scale={scale!r} is not allowed; use {' | '.join(SCALES)}")
    if activation_bits == 8 and group_size is not None:
        raise CannotQuantize(
            f"group_size={group_size} with activation_bits=8: int8 products have one scale per output channel. "
            f"Use group_size=None, or activation_bits=None."
        )


def _int8(weight: Tensor, bits: int, scale: str) -> Tensor:
    """For torchao's int8 product, as its Int8DynamicActivationInt8WeightConfig makes it, but with our steps."""
    try:
        from torchao.quantization import Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    except ImportError as error:
        raise CannotQuantize(f"int8 products need a newer torchao: {INSTALL} ({error})") from error
    steps = scales(weight, bits, None, scale)
    return Int8Tensor(
        codes(weight, steps, bits), steps.view(-1, 1), [1, weight.shape[1]], weight.dtype,
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
    )  # fmt: skip


def _weight_only(name: str, weight: Tensor, bits: int, group_size: int | None, scale: str) -> Tensor:
    """For torchao's emulation, as its IntxWeightOnlyConfig makes it, but with our steps."""
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor
    except ImportError as error:
        raise CannotQuantize(f"weights of {bits} bits need a newer torchao: {INSTALL} ({error})") from error
    if weight.dim() not in (2, 4) or (weight.dim() == 4 and group_size is not None):
        raise CannotQuantize(
            f"{name} of shape {list(weight.shape)}: linear layers, and 2-D convolutions with group_size=None, can be "
            f"stored in low-bit form. Leave it out: skip=[{name!r}]"
        )
    check_groups(weight.shape, group_size, name)
    steps = scales(weight, bits, group_size, scale)
    block = (1, group_size or weight.shape[1], *weight.shape[2:])
    typed: Any = steps.view(*(n // b for n, b in zip(weight.shape, block, strict=True))).to(weight.dtype)
    return IntxUnpackedToInt8Tensor(
        codes(weight, steps, bits), typed, torch.zeros_like(typed, dtype=torch.int8), getattr(torch, f"int{bits}"),
        block, weight.dtype, None,
    )  # fmt: skip
