"""Frozen linear layers kept in 4 or 8 bits a weight: what LoRA trains beside (QLoRA).

`nf4`: 64 weights share a scale, and each is the nearest of the 16 quantiles of a normal distribution; the scales are
quantized once more, 256 to a group ("double quantization"): 0.516 bytes a weight. `int8`: every row has one scale: 1
byte a weight. The layer's forward makes the weight anew in the dtype it computes in, and so does backward, which has
a gradient for the input alone.

Codes and scales are frozen parameters of integer types: they are saved, sent to other ranks and kept in safetensors as
any other, and no cast of the model rounds them (float32 scales are kept as their bits). bitsandbytes keeps a part of
such a layer in Python objects beside its parameters, torchao in tensor subclasses.

Source: Dettmers et al., QLoRA, arXiv 2305.14314 §3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, GROUP = 64, 256  # weights to a scale, scales to a scale of scales
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCKS_AT_ONCE = 1 << 10  # 65,536 weights: what is quantized at a time, in float32 and in cache
_STEPS = (
    1 << 15
)  # of the table of codes: a weight may get the second-nearest level where the two are as near to 1 / 2^15


def nf4_codes(weight: Tensor) -> dict[str, Tensor]:
    """A weight of any shape as two codes a byte, its scales in 8 bits, and their own scales with the mean last."""
    flat = weight.detach().reshape(-1)
    padded = -(-flat.numel() // BLOCK) * BLOCK
    if padded != flat.numel():
        flat = F.pad(flat, (0, padded - flat.numel()))
    codes, packed, largest = _nearest(weight.device), [], []
    for blocks in flat.view(-1, BLOCK).split(_BLOCKS_AT_ONCE):
        values = blocks.float()
        scale = values.abs().amax(1)
        places = torch.mul(values, (_STEPS / 2 / scale.clamp_min(1e-30))[:, None]).add_(_STEPS / 2).round_().int()
        both = codes.index_select(0, places.view(-1)).view(-1, 2)
        packed.append(both[:, 0] << 4 | both[:, 1])
        largest.append(scale)
    scales, mean = torch.cat(largest), torch.cat(largest).mean()
    groups = F.pad(scales - mean, (0, -scales.numel() % GROUP)).view(-1, GROUP)
    steps = groups.abs().amax(1).clamp_min(1e-30) / 127
    rounded = (groups / steps[:, None]).round().to(torch.int8).view(-1)[: scales.numel()]
    return {
        "weight": torch.cat(packed),
        "weight_scales": rounded.clone(),
        "weight_steps": torch.cat([steps, mean[None]]).view(torch.int32),
    }


def nf4_weight(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that `nf4_codes` made the parts of."""
    steps, scales = parts["weight_steps"].view(torch.float32), parts["weight_scales"].float()
    groups = F.pad(scales, (0, -scales.numel() % GROUP)).view(-1, GROUP) * steps[:-1, None]
    scales = groups.view(-1)[: scales.numel()] + steps[-1]
    values = F.embedding(parts["weight"].int(), _pairs(parts["weight"].device)).view(-1, BLOCK).mul_(scales[:, None])
    return values.view(-1)[: shape.numel()].view(shape).to(dtype)


@cache
def _nearest(device: torch.device) -> Tensor:
    """The code of each of `_STEPS` + 1 values from -1 to 1: looking it up takes a tenth of comparing with 15 bounds."""
    bounds = torch.tensor([(low + high) / 2 for low, high in pairwise(NF4)], device="cpu")
    values = torch.arange(_STEPS + 1, device="cpu") / (_STEPS / 2) - 1
    return torch.bucketize(values, bounds).to(torch.uint8).to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two weights that each byte stands for, [256, 2]."""
    levels = torch.tensor(NF4, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)


def int8_codes(weight: Tensor) -> dict[str, Tensor]:
    """A weight [rows, columns] in 8 bits with a scale for each row."""
    steps = weight.detach().abs().amax(1).float().clamp_min(1e-30) / 127
    rows = [(part.float() / step[:, None]).round() for part, step in _rows(weight.detach(), steps)]
    return {"weight": torch.cat([part.to(torch.int8) for part in rows]), "weight_steps": steps.view(torch.int32)}


def _rows(weight: Tensor, steps: Tensor) -> Any:
    at_once = max(1, _BLOCKS_AT_ONCE * BLOCK // weight.shape[1])
    return zip(weight.split(at_once), steps.split(at_once), strict=True)


def int8_weight(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that `int8_codes` made the parts of."""
    return (parts["weight"].float() * parts["weight_steps"].view(torch.float32)[:, None]).view(shape).to(dtype)


def nf4_sizes(shape: torch.Size) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shapes and types of what `nf4_codes` makes of a weight."""
    blocks = -(-shape.numel() // BLOCK)
    return {
        "weight": ([blocks * BLOCK // 2], torch.uint8),
        "weight_scales": ([blocks], torch.int8),
        "weight_steps": ([-(-blocks // GROUP) + 1], torch.int32),
    }


def int8_sizes(shape: torch.Size) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shapes and types of what `int8_codes` makes of a weight."""
    return {"weight": (list(shape), torch.int8), "weight_steps": ([shape[0]], torch.int32)}


@dataclass(frozen=True)
class Codec:
    """How weights are written in 4 or 8 bits, what that takes, and how they are read back."""

    write: Callable[[Tensor], dict[str, Tensor]]
    sizes: Callable[[torch.Size], dict[str, tuple[list[int], torch.dtype]]]
    read: Callable[[dict[str, Tensor], torch.Size, torch.dtype], Tensor]

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """The codes of a weight; of one on the meta device, their shapes alone, which takes no time."""
        if not weight.is_meta:
            return self.write(weight)
        sizes = self.sizes(weight.shape).items()
        return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes}


CODECS = {"nf4": Codec(nf4_codes, nf4_sizes, nf4_weight), "int8": Codec(int8_codes, int8_sizes, int8_weight)}


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept as codes; it computes in its input's dtype, or in autocast's.

    Args:
        like: The layer that it stands for; its weight is quantized, unless it is on the meta device.
        kind: "nf4" or "int8".

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 64)
        >>> kept = QuantizedLinear(layer, "nf4")
        >>> kept.weight.numel(), kept.dequantized(torch.float32).shape
        (2048, torch.Size([64, 64]))
    """

    def __init__(self, like: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)  # a Linear's own would make the weight
        self.in_features, self.out_features, self.kind = like.in_features, like.out_features, kind
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach(), requires_grad=False)
        for name, part in CODECS[kind].parts(like.weight).items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    @property
    def numel(self) -> int:
        """Weights that the codes stand for."""
        return self.in_features * self.out_features

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that it computes with."""
        parts = {name: p.data for name, p in self._parameters.items() if p is not None and name != "bias"}
        return CODECS[self.kind].read(parts, torch.Size((self.out_features, self.in_features)), dtype)

    def dequantize(self) -> Tensor:
        """The weight in float32, as PEFT asks layers for that have a `W_q`."""
        return self.dequantized(torch.float32)

    @property
    def W_q(self) -> Tensor:
        """The codes, under the name by which PEFT tells a quantized layer."""
        return self.weight

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary frozen layer that computes the same."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.dequantized(dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output = _Product.apply(input.to(dtype), self)
        return output if self.bias is None else output + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """input @ weight.T, with a gradient for the input; the weight is made anew in backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return input @ layer.dequantized(input.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


def weights_in(module: nn.Module) -> int:
    """Parameters of a model, quantized weights counted one by one."""
    codes = {id(p) for part in module.modules() if isinstance(part, QuantizedLinear) for n, p in _codes(part)}
    quantized = sum(part.numel for part in module.modules() if isinstance(part, QuantizedLinear))
    return quantized + sum(p.numel() for p in module.parameters() if id(p) not in codes)


def _codes(layer: QuantizedLinear) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in layer.named_parameters(recurse=False) if name != "bias"]


def dequantize(model: nn.Module) -> None:
    """Put ordinary float32 layers in the place of quantized ones."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, QuantizedLinear):
                setattr(part, name, child.plain())
