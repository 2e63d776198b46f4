"""In which shape to prune: N of every M, or whole blocks. Pure functions on whole weights.

A weight [out, in, ...] counts as a matrix [out, in * ...].
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn.functional import pad


def n_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask, bool, of the `n` largest scores of every `m` neighbours in a row; of equal ones the first (2104.08378).

    Where a row's length is no multiple of `m`, its last group is shorter and keeps up to `n` as well.
    """
    rows = score.reshape(score.shape[0], -1)
    short = -rows.shape[1] % m
    groups = pad(rows, (0, short), value=-torch.inf).view(rows.shape[0], -1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return mask.view(rows.shape[0], -1)[:, : rows.shape[1]].reshape(score.shape)


def block_of(pattern: str) -> tuple[int, int] | None:
    """(rows, columns) of a block such as "4x4", "1x16", "1x*" (an output neuron), "*x1" (an input); 0 means all.

    None for "unstructured". Raises ValueError for anything else.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\*|[1-9]\d*)x(\*|[1-9]\d*)", pattern)
    if not match:
        raise ValueError(pattern)
    rows, columns = (0 if size == "*" else int(size) for size in match.groups())
    return rows, columns


def blocks(score: Tensor, block: tuple[int, int], density: float) -> Tensor:
    """Mask, bool, that keeps the share `density` of blocks, those with the largest sums of scores."""
    matrix = score.reshape(score.shape[0], -1)
    height, width = (size or whole for size, whole in zip(block, matrix.shape, strict=True))
    below, beside = -matrix.shape[0] % height, -matrix.shape[1] % width
    tiles = pad(matrix, (0, beside, 0, below)).view(-(-matrix.shape[0] // height), height, -1, width)
    sums = tiles.sum(dim=(1, 3))
    kept = sums.numel() - int((1.0 - density) * sums.numel() + 1e-9)
    order = sums.reshape(-1).argsort(descending=True, stable=True)
    chosen = torch.zeros(sums.numel(), dtype=torch.bool, device=score.device)
    chosen[order[:kept]] = True
    spread = chosen.view(sums.shape).repeat_interleave(height, 0).repeat_interleave(width, 1)
    return spread[: matrix.shape[0], : matrix.shape[1]].reshape(score.shape)
