"""AdamW whose two moments take a byte each."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .stepping import Stepping

BLOCK = 256  # elements that share a scale
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
        moments = {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}
        for start in range(0, p.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            if p.numel() < SMALL:
                first, second = moments["exp_avg"], moments["exp_avg_sq"]
                self._chunk(weights, gradients, first, second, state["step"], group)
                continue
            blocks = slice(start // BLOCK, (start + CHUNK) // BLOCK)
            scales = [state[f"{name}_scale"][blocks] for name in moments]
            first = decode(moments["exp_avg"][part], scales[0], signed=True)
            second = decode(moments["exp_avg_sq"][part], scales[1], signed=False).square_()
            self._chunk(weights[part], gradients[part], first, second, state["step"], group)
            encode(first, moments["exp_avg"][part], scales[0], signed=True)
            encode(second.sqrt_(), moments["exp_avg_sq"][part], scales[1], signed=False)
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

    def _begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0.0
        blocks = -(-p.numel() // BLOCK)
        for name in ("exp_avg", "exp_avg_sq"):
            if p.numel() < SMALL:
                state[name] = torch.zeros(p.shape, device=p.device)
            else:
                state[name] = torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
                state[f"{name}_scale"] = torch.zeros(blocks, device=p.device)

    def _chunk(
        self, p: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: float, group: dict[str, Any]
    ) -> None:
        gradient, (keep, keep_square) = grad.float(), group["betas"]
        first.lerp_(gradient, 1.0 - keep)
        second.mul_(keep_square).addcmul_(gradient, gradient, value=1.0 - keep_square)
        size = (second / (1.0 - keep_square**step)).sqrt_().add_(group["eps"])
        p.mul_(1.0 - group["lr"] * group["weight_decay"])
        p.sub_((first / size).mul_(group["lr"] / (1.0 - keep**step)).to(p.dtype))


def encode(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Write float32 `values` [n] as bytes to `codes` [n], and the largest of each block to `scales` [ceil(n / 256)]."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    torch.amax(blocks.abs(), 1, out=scales)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    halves = shares.view(torch.int32).bitwise_right_shift_(16).bitwise_and_(0xFFFF).view(-1)[: len(values)]
    torch.index_select(_tables(signed, values.device)[1], 0, halves, out=codes)


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The values [n], in float32, of bytes [n] and their blocks' scales [ceil(n / 256)]."""
    values = torch.index_select(_tables(signed, codes.device)[0], 0, codes.int())
    whole = len(codes) // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
    values[whole:].mul_(scales[-1])
    return values


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The value of every byte [256], and the nearest byte of every upper half of a float32 [65536]."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1.0, 2 ** (exponent if signed else exponent + 1) + 1, dtype=torch.float64)
        means = (10.0 ** (exponent - 6) * (bounds[:-1] + bounds[1:]) / 2).tolist()
        values += means + ([-value for value in means] if signed else [])
    ascending = torch.tensor(sorted(values))
    zero = sorted(values).index(0.0)
    middle = ((torch.arange(2**16) << 16) + 2**15).to(torch.int32).view(torch.float32)  # of all that share the half
    nearest = torch.bucketize(middle, (ascending[:-1] + ascending[1:]) / 2) - zero
    nearest += (nearest == 0) * middle.nan_to_num().sign().long()  # what is not 0 stays so
    nearest[[0, 2**15]] = 0
    return ascending.roll(-zero).to(device), (nearest & 255).to(torch.uint8).to(device)
