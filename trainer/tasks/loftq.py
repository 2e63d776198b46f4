"""LoftQ: adapters that begin with what a low-bit base has lost of its weights.

A layer computes with Q + s B A: codes Q, and the adapter's matrices with their scale s. They are found by turns: Q are
the codes of what s B A leaves of the weight W, and s B A is the product of rank r nearest to what Q leaves of it. After
the first turn that is the base as it was, with the best adapter; a further one is kept if it comes nearer to W.

Source: Li et al., LoftQ, arXiv 2310.08659, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .quantized import CODECS, QuantizedLinear

TURNS = 5  # at most: the first brings most, and one that comes no nearer ends it
_BESIDE, _POWERS = 8, 4  # columns beside those wanted, and power iterations: twice as many come 0.2 % nearer
_WITHIN = "base_model.model."  # PEFT's, before the names that layers have without it
Show = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Split:
    """A weight [out, in] as codes and a product beside them: left [out, r], right [r, in]."""

    codes: dict[str, Tensor]
    left: Tensor
    right: Tensor


def split(weight: Tensor, kind: str, rank: int) -> Split:
    """Codes of `kind` and a product of at most `rank` that together come near to a weight; the same in every process.

    Args:
        weight: [out, in], of any floating type.
        kind: "nf4" or "int8".
        rank: Of the product; the sizes of the weight limit it.

    Example:
        >>> import torch
        >>> parts = split(torch.eye(64), "nf4", rank=4)
        >>> parts.left.shape, parts.right.shape
        (torch.Size([64, 4]), torch.Size([4, 64]))
    """
    weight, codec = weight.detach().float(), CODECS[kind]
    best, least, rest = None, float("inf"), weight
    for _ in range(TURNS):
        codes = codec.write(rest)
        lost = weight - codec.read(codes, weight.shape, torch.float32)
        left, right = _nearest_product(lost, rank)
        error = float(torch.addmm(lost, left, right, alpha=-1).norm())
        if best is not None and error >= least:
            break
        best, least = Split(codes, left, right), error
        rest = torch.addmm(weight, left, right, alpha=-1)
    assert best is not None
    return best


def _nearest_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Its largest singular values and vectors, by random projections that are the same each time (arXiv 0909.4061)."""
    width = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(width + _BESIDE, *matrix.shape), _POWERS)
    root = s[:width].sqrt()
    return u[:, :width] * root, root[:, None] * v[:, :width].t()


def begin_with_losses(adapted: nn.Module, read: Callable[[Show], None]) -> None:
    """Split the weights of all adapted layers that are quantized; others begin as LoRA does, and lose nothing.

    Args:
        adapted: A model with LoRA. What it keeps of a split layer is in new memory, and to be saved with the adapters.
        read: Shows the weights that the base was made of, one after another, by the paths of their layers.
    """
    from peft.tuners.lora import LoraLayer

    parts: dict[str, Any] = {n: part for n, part in adapted.named_modules() if isinstance(part, LoraLayer)}
    before: list[nn.Parameter] = []  # a base that was changed is told by its parameters: nobody may take their places

    def show(path: str, weight: Tensor) -> None:
        part = parts.get(_WITHIN + path)
        if part is None or not isinstance(part.base_layer, QuantizedLinear):
            return
        base, a, b = part.base_layer, part.lora_A["default"].weight, part.lora_B["default"].weight
        made, root = split(weight, base.kind, len(a)), part.scaling["default"] ** 0.5
        for name, code in made.codes.items():
            old = base.get_parameter(name)
            before.append(old)
            old.data = old.data.new_empty(0)
            setattr(base, name, nn.Parameter(code, requires_grad=False))
        wide = len(made.right)  # less than the adapter's rank where the layer is narrow: the others begin as LoRA's
        with torch.no_grad():
            a[:wide] = made.right / root
            b[:, :wide] = made.left / root

    read(show)
