"""Numbers on a grid of few levels, shown to the forward pass while the full numbers are trained: tensor in, tensor out.

Every grid here is symmetric, so zero is a level and stays zero: what was pruned remains pruned. Weights of `bits` bits
have the levels -Q … Q times a scale, Q = 2^(bits-1) - 1, one scale per output channel or per group of inputs; the level
-Q-1 is left out, as in ONNX Runtime. The gradient of rounding, zero almost everywhere, is replaced by 1 (the
straight-through estimator, arXiv 1308.3432; for quantization arXiv 1712.05877).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ShoestringError
from ..forward.forward_weights import straight_through

SCALES = ("absmax", "mse", "lsq")
# Bits of weights in int8 products, by the CPUs that compute these right. x86 without VNNI adds two products of an
# unsigned and a signed byte in 16 bits that saturate at 32767: 2 * 255 * 63 fits, 2 * 255 * 127 does not.
PRODUCT_BITS = {"any": 7, "vnni": 8}
_SHRINK = 20  # candidates that `mse` tries, from the whole range down to 15 % of it


class BadGroups(ShoestringError):
    """Rows that cannot be cut into groups of the size asked for."""


class OffGrid(ShoestringError):
    """Weights that should lie on a grid and do not."""


def highest(bits: int) -> int:
    """Q, the largest code: 127 of 8 bits, 7 of 4, 3 of 3, 1 of 2."""
    return 2 ** (bits - 1) - 1


def product_bits(weight_bits: int, cpu: str) -> int:
    """Return the grid's bits for weights of at most `weight_bits` in int8 products right on `cpu`, of PRODUCT_BITS."""
    return min(weight_bits, PRODUCT_BITS[cpu])


def check_groups(shape: torch.Size, group_size: int | None, name: str = "weight") -> None:
    """Raise `BadGroups` unless a weight [out, …] has rows that `group_size` divides."""
    row = shape[1:].numel()
    if group_size is not None and row % group_size:
        raise BadGroups(
            f"{name} has {row} inputs a row, which groups of {group_size} do not divide; use a group_size that does, "
            f"None for one scale a row, or leave the layer out with skip"
        )


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """A weight [out, …] as [out, groups, inputs of a group]."""
    check_groups(weight.shape, group_size)
    flat = weight.reshape(weight.shape[0], -1)
    return flat.unsqueeze(1) if group_size is None else flat.unflatten(1, (-1, group_size))


def scales(weight: Tensor, bits: int, group_size: int | None = None, rule: str = "absmax") -> Tensor:
    """The step of each group's grid, [out, groups, 1] in float32.

    "absmax": the largest weight is the highest level, nothing is clipped. "mse": the step of least squared error among
    20 that clip more and more, then refined by least squares given the codes; it matters at 4 bits and fewer, and costs
    some 40 more passes over the weight. "lsq": the step of the grid on which training with learned steps has left the
    weights, found again from them alone; `OffGrid` where they lie on none. A group of zeros has the step 1.
    """
    groups = grouped(weight.detach().float(), group_size)
    full = groups.abs().amax(-1, keepdim=True) / highest(bits)
    full = torch.where(full > 0, full, torch.ones_like(full))
    if rule == "lsq":
        return _recovered_steps(groups, full * highest(bits), highest(bits))
    return full if rule == "absmax" else _least_squares(groups, full, highest(bits))


def _recovered_steps(groups: Tensor, largest: Tensor, top: int) -> Tensor:
    """The largest step of which every weight of a group is a multiple from -top to top.

    The step is largest / k for the code k of the largest weight. A wrong k misses some whole number by 1/top or more,
    since codes c and K give c k / K; the float32 of weights that were rounded to a grid misses by 2e-5 at most.
    """
    steps = torch.zeros_like(largest)
    for k in range(1, top + 1):
        code = groups / largest * k
        fits = (code - code.round()).abs().amax(-1, keepdim=True) < 0.25 / top
        steps = torch.where((steps == 0) & fits, largest / k, steps)
        if steps.all():
            return torch.where(groups.any(-1, keepdim=True), steps, torch.ones_like(steps))
    raise OffGrid(
        f"{int((steps == 0).sum())} of {steps.numel()} groups of weights lie on no grid of {2 * top + 1} levels: they "
        "were not trained with scale='lsq', bits and group_size as here, or were changed or rounded since. "
        "Use scale='mse'."
    )


def _least_squares(groups: Tensor, full: Tensor, top: int) -> Tensor:
    best, least = full, torch.full_like(full, float("inf"))
    for k in range(_SHRINK):
        step = full * 0.15 ** (k / (_SHRINK - 1))
        code = (groups / step).round().clamp(-top, top)
        norm = (code * code).sum(-1, keepdim=True)
        refined = torch.where(norm > 0, (groups * code).sum(-1, keepdim=True) / norm.clamp(min=1), step)
        error = ((groups - refined * code) ** 2).sum(-1, keepdim=True)
        best, least = torch.where(error < least, refined, best), torch.minimum(error, least)
    return best


def codes(weight: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The nearest levels, int8 in -Q … Q, in the weight's shape. `steps`: [out, groups, 1], as `scales` gives them."""
    groups = weight.detach().float().reshape(*steps.shape[:2], -1)
    return (groups / steps).round().clamp(-highest(bits), highest(bits)).to(torch.int8).view(weight.shape)


def values(code: Tensor, steps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of the codes, in their shape."""
    return (code.reshape(*steps.shape[:2], -1) * steps).view(code.shape).to(dtype)


def quantized(weight: Tensor, bits: int, group_size: int | None = None, rule: str = "absmax") -> Tensor:
    """The weight on its grid, same shape and dtype, without a gradient."""
    steps = scales(weight, bits, group_size, rule)
    return values(codes(weight, steps, bits), steps, weight.dtype)


def fake_quantize_weight(weight: Tensor, bits: int, group_size: int | None = None, rule: str = "absmax") -> Tensor:
    """`quantized` with the straight-through gradient; weights that "mse" clips get theirs too."""
    return straight_through(weight, quantized(weight, bits, group_size, rule))


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """Activations [..., features] in int8, one scale per token taken from its largest value, straight-through gradient.

    The step is absmax / 127.5 with codes -128 … 127: what torchao's int8 kernel does when it serves the model.
    """
    wide = x.detach().float()
    step = wide.abs().amax(-1, keepdim=True) / 127.5
    step = torch.where(step > 0, step, torch.ones_like(step))
    return straight_through(x, ((wide / step).round().clamp(-128, 127) * step).to(x.dtype))


def learned_step(weight: Tensor, steps: Tensor, bits: int) -> Tensor:
    """LSQ: quantize with trained steps [out, groups, 1] (arXiv 1902.08153, eqs. 1-3).

    The gradient of a step sums, over its weights, round(w/s) - w/s inside the range and -Q or Q outside, times
    1/sqrt(N Q) for N weights, which makes steps move as much, relative to their size, as weights do. Clipped weights
    get no gradient.
    """
    return _LearnedStep.apply(weight, steps, bits)  # type: ignore[no-untyped-call]


def first_steps(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """Return the first steps of LSQ: 2 mean(|w|) / sqrt(Q) of each group, [out, groups, 1] (arXiv 1902.08153 §2.1)."""
    mean = grouped(weight.detach().float(), group_size).abs().mean(-1, keepdim=True)
    return torch.where(mean > 0, 2 * mean / highest(bits) ** 0.5, torch.ones_like(mean))


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, steps: Tensor, bits: int) -> Tensor:
        top = highest(bits)
        exact = weight.float().reshape(*steps.shape[:2], -1) / steps
        code = exact.round().clamp(-top, top)
        # one tensor instead of the weight itself, which ZeRO-3 may have released by the time of backward
        ctx.save_for_backward(torch.where(exact.abs() <= top + 0.5, code - exact.clamp(-top - 0.5, top + 0.5), code))
        ctx.top = top
        return (code * steps).view(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        groups = gradient.float().reshape(slope.shape)
        inside = (slope.abs() <= 0.5).view(gradient.shape)
        scale = (slope.shape[-1] * ctx.top) ** -0.5
        return gradient * inside, (groups * slope).sum(-1, keepdim=True) * scale, None
