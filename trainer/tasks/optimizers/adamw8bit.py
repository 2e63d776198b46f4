"""AdamW whose two moments take a byte each, or half a byte."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .stepping import Stepping

BLOCKS = {8: 256, 4: 128}  # bits: elements that share a scale
SMALL = 4096  # parameters of fewer elements keep float32: they are few bytes, and often the sensitive ones
CHUNK = 2**20  # elements that are in float32 at a time


class AdamW8bit(Stepping):
    """AdamW with moments of one byte an element, scaled by the largest of each block of 256.

    The bytes are the dynamic tree codes of the paper. Two things differ from it: the second moment is kept by its root,
    which has half as many orders of magnitude, and what is not 0 is never rounded to 0, so no step divides by nothing.
    A byte of 0 means 0.0, so that masks may clear moments.

    Source: Dettmers et al., arXiv 2110.02861.

    Args:
        params: Parameters or groups.
        lr: The learning rate.
        betas: Of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Beside the gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> weight.grad = torch.ones(64, 64)
        >>> optimizer = AdamW8bit([weight], lr=0.5)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].dtype, round(weight[0, 0].item(), 6)
        (torch.uint8, 0.5)
    """

    bits = 8
    codes: tuple[str, ...] = ("exp_avg", "exp_avg_sq")  # the states that hold them

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step, a chunk at a time."""
        if not state:
            self._begin(p, state)
        state["step"] += 1.0
        weights, gradients = p.reshape(-1), grad.reshape(-1)
        if p.numel() < SMALL:
            first, second = (state[name].view(-1) for name in ("exp_avg", "exp_avg_sq"))
            self._chunk(weights, gradients, first, second, state["step"], group)
        for start in range(0, p.numel() if p.numel() >= SMALL else 0, CHUNK):
            part = slice(start, start + CHUNK)
            scales = [state[f"{name}_scale"][self._blocks(start)] for name in ("exp_avg", "exp_avg_sq")]
            codes = [state[name].view(-1)[part] for name in self.codes]
            first, second = self.read(codes, scales)
            self._chunk(weights[part], gradients[part], first, second.square_(), state["step"], group)
            self.write(first, second.sqrt_(), codes, scales)
        if not p.is_contiguous():
            p.copy_(weights.view(p.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's own, which would turn bytes into the parameters' dtype."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(saved, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[p][key] = value.to(p.device, copy=True) if torch.is_tensor(value) else value

    def read(self, codes: list[Tensor], scales: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The first moment and the root of the second, in float32."""
        return decode(codes[0], scales[0], signed=True), decode(codes[1], scales[1], signed=False)

    def write(self, first: Tensor, root: Tensor, codes: list[Tensor], scales: list[Tensor]) -> None:
        """Put them back."""
        encode(first, codes[0], scales[0], signed=True)
        encode(root, codes[1], scales[1], signed=False)

    def _blocks(self, start: int) -> slice:
        return slice(start // BLOCKS[self.bits], (start + CHUNK) // BLOCKS[self.bits])

    def _begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0.0
        names = ("exp_avg", "exp_avg_sq")
        if p.numel() < SMALL:
            state.update({name: torch.zeros(p.shape, device=p.device) for name in names})
            return
        state.update({name: torch.zeros(p.shape, dtype=torch.uint8, device=p.device) for name in self.codes})
        blocks = -(-p.numel() // BLOCKS[self.bits])
        state.update({f"{name}_scale": torch.zeros(blocks, device=p.device) for name in names})

    def _chunk(
        self, p: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: float, group: dict[str, Any]
    ) -> None:
        gradient, (keep, keep_square) = grad.float(), group["betas"]
        first.lerp_(gradient, 1.0 - keep)
        second.mul_(keep_square).addcmul_(gradient, gradient, value=1.0 - keep_square)
        size = (second / (1.0 - keep_square**step)).sqrt_().add_(group["eps"])
        p.mul_(1.0 - group["lr"] * group["weight_decay"])
        p.sub_((first / size).mul_(group["lr"] / (1.0 - keep**step)).to(p.dtype))


class AdamW4bit(AdamW8bit):
    """AdamW with both moments of an element in one byte, scaled by the largest of each block of 128.

    As with 8 bits, the codes are dynamic trees, the second moment is kept by its root, what is not 0 is never rounded
    to 0, and a byte of 0 means that both are 0.

    Source: Li et al., arXiv 2309.01507.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> weight.grad = torch.ones(64, 64)
        >>> optimizer = AdamW4bit([weight], lr=0.5)
        >>> optimizer.step()
        >>> optimizer.state[weight]["moments"].dtype, round(weight[0, 0].item(), 6)
        (torch.uint8, 0.5)
    """

    bits = 4
    codes = ("moments",)

    def read(self, codes: list[Tensor], scales: list[Tensor]) -> tuple[Tensor, Tensor]:
        """From the lower and the upper half of the bytes."""
        lower, upper = codes[0].bitwise_and(15), codes[0].bitwise_right_shift(4)
        return decode(lower, scales[0], signed=True, bits=4), decode(upper, scales[1], signed=False, bits=4)

    def write(self, first: Tensor, root: Tensor, codes: list[Tensor], scales: list[Tensor]) -> None:
        """To both halves."""
        encode(root, codes[0], scales[1], signed=False, bits=4)
        lower = torch.empty_like(codes[0])
        encode(first, lower, scales[0], signed=True, bits=4)
        codes[0].bitwise_left_shift_(4).bitwise_or_(lower)


def encode(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool, bits: int = 8) -> None:
    """Write float32 `values` [n] as codes of so many bits to `codes` [n], the largest of each block to `scales`."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCKS[bits])).view(-1, BLOCKS[bits])
    torch.amax(blocks.abs(), 1, out=scales)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    halves = shares.view(torch.int32).bitwise_right_shift_(16).bitwise_and_(0xFFFF).view(-1)[: len(values)]
    torch.index_select(_tables(signed, bits, values.device)[1], 0, halves, out=codes)


def decode(codes: Tensor, scales: Tensor, *, signed: bool, bits: int = 8) -> Tensor:
    """The values [n], in float32, of codes [n] and their blocks' scales."""
    values = torch.index_select(_tables(signed, bits, codes.device)[0], 0, codes.int())
    whole = len(codes) // BLOCKS[bits] * BLOCKS[bits]
    values[:whole].view(-1, BLOCKS[bits]).mul_(scales[: whole // BLOCKS[bits], None])
    values[whole:].mul_(scales[-1])
    return values


@cache
def _tables(signed: bool, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The value of every code [2 ** bits], and the nearest code of every upper half of a float32 [65536]."""
    values = [0.0, 1.0]
    for exponent in range(bits - 1):
        bounds = torch.linspace(0.1, 1.0, 2 ** (exponent if signed else exponent + 1) + 1, dtype=torch.float64)
        means = (10.0 ** (exponent - bits + 2) * (bounds[:-1] + bounds[1:]) / 2).tolist()
        values += means + ([-value for value in means] if signed else [])
    ascending = torch.tensor(sorted(values))
    zero = sorted(values).index(0.0)
    middle = ((torch.arange(2**16) << 16) + 2**15).to(torch.int32).view(torch.float32)  # of all that share the half
    nearest = torch.bucketize(middle, (ascending[:-1] + ascending[1:]) / 2) - zero
    nearest += (nearest == 0) * middle.nan_to_num().sign().long()  # what is not 0 stays so
    nearest[[0, 2**15]] = 0
    return ascending.roll(-zero).to(device), (nearest & (2**bits - 1)).to(torch.uint8).to(device)
