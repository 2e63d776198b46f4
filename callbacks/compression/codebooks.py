"""Codebooks: weights that share a few values, found by k-means in one dimension (Deep Compression, arXiv 1510.00149).

A codebook is a sorted float32 tensor [k]. A weight belongs to its nearest centroid, the lower one if two are as near:
assignments follow from weights and codebook, and need no storage while training.

Every sum over weights is taken of integers, the weights in units of 2^-30 of the largest: whole numbers add up to the
same in any order, so a codebook is the same bit for bit however its weights are spread over ranks and devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import ShoestringError
from ..parameters.selection import peaks

INITS = ("linear", "density")
LARGEST = 256  # indices of one byte
_BITS = 30  # 2^33 weights of a layer still add up to an int64
_ROUNDS = 24  # halvings of the range in search of a quantile: as fine as float32

Total = Callable[[Tensor], Tensor]


class NotInCodebook(ShoestringError):
    """A weight has a value that its codebook does not have."""


# -- assignment --------------------------------------------------------------------------------------------------------
def nearest(weight: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest centroid of every weight: int32, shaped like `weight`."""
    return torch.bucketize(weight.float(), _between(codebook), out_int32=True)


def clustered(weight: Tensor, codebook: Tensor) -> Tensor:
    """Every weight's nearest centroid, in shape and dtype of `weight`."""
    return codebook[nearest(weight, codebook)].to(weight.dtype)


def _between(codebook: Tensor) -> Tensor:
    return (codebook[1:] + codebook[:-1]) / 2


# -- k-means -----------------------------------------------------------------------------------------------------------
def kmeans_1d(
    values: Tensor, clusters: int, *, init: str = "linear", keep_zero: bool = False, iterations: int = 20
) -> Tensor:
    """The codebook [clusters] of `values` [n] after `iterations` of Lloyd's algorithm. Deterministic.

    `init`: "linear" starts evenly spaced over the range, "density" at evenly spaced quantiles. With `keep_zero` one
    centroid is 0 and stays there. A centroid that nothing is nearest to stays where it is.
    """
    books = first_codebooks([values], clusters, init, keep_zero, lambda sums: sums)
    return lloyd([values], books, keep_zero, iterations, lambda sums: sums)[0]


def first_codebooks(values: Sequence[Tensor], clusters: int, init: str, keep_zero: bool, total: Total) -> list[Tensor]:
    """Return where Lloyd's algorithm starts, for the union over ranks of `values[i]` [n_i]: a codebook [clusters] each.

    `total` sums a tensor over the ranks (identity where each rank has everything); so it does below.
    """
    if clusters < 2 + keep_zero:
        raise ValueError(f"{clusters} clusters are too few: use {2 + keep_zero} or more with keep_zero={keep_zero}")
    ranges = _ranges(values, total)
    if init == "linear":
        books = [torch.linspace(low, high, clusters) for low, high in ranges]
        for book in books if keep_zero else ():
            inner = book[1:-1] if book[0] * book[-1] else book  # both ends keep their centroids
            inner[inner.abs().argmin()] = 0.0
    elif keep_zero:  # zeros have a centroid of their own, so quantiles are those of the others
        books = _quantiles([v[v != 0] for v in values], ranges, clusters - 1, total)
        books = [torch.cat([book, book.new_zeros(1)]).sort().values for book in books]
    else:
        books = _quantiles(values, ranges, clusters, total)
    return [book.to(v.device) for book, v in zip(books, values, strict=True)]


def lloyd(
    values: Sequence[Tensor], codebooks: Sequence[Tensor], keep_zero: bool, iterations: int, total: Total
) -> list[Tensor]:
    """Move every centroid to the mean of the weights nearest to it, `iterations` times, each one sum over ranks."""
    books = list(codebooks)
    peaks = [max(-low, high) for low, high in _ranges(values, total)]
    units = [2.0 ** (math.frexp(peak)[1] - _BITS) for peak in peaks]
    ordered = [v.float().sort().values for v in values]
    sums = [_running((o.double() / unit).round_().long()) for o, unit in zip(ordered, units, strict=True)]
    for _ in range(iterations):
        cells = [_cells(o, s, book) for o, s, book in zip(ordered, sums, books, strict=True)]
        for i, (counts, amounts) in enumerate(total(torch.stack(cells))):
            means = (amounts.double() / counts.clamp(min=1) * units[i]).float()
            stays = counts == 0
            if keep_zero:
                stays = stays | (books[i] == 0)
            books[i] = torch.where(stays, books[i], means)
    return books


def _cells(ordered: Tensor, sums: Tensor, codebook: Tensor) -> Tensor:
    """How many weights are nearest to each centroid, and their sum: int64 [2, k]."""
    inner = torch.searchsorted(ordered, _between(codebook), right=True)
    edges = torch.nn.functional.pad(inner, (1, 1))
    edges[-1] = len(ordered)
    return torch.stack([edges.diff(), sums[edges].diff()])


def _running(amounts: Tensor) -> Tensor:
    return torch.nn.functional.pad(amounts.cumsum(0), (1, 0))


def _sizes(values: Sequence[Tensor], total: Total) -> Tensor:
    return total(torch.tensor([len(v) for v in values], dtype=torch.int64, device=values[0].device))


def _ranges(values: Sequence[Tensor], total: Total) -> list[tuple[float, float]]:
    """(smallest, largest) value of each, 0 included: exact, over all ranks."""
    highest = [max(0.0, peak) for peak in peaks([*values, *(-v for v in values)], total)]
    return [(-low, high) for high, low in zip(highest[: len(values)], highest[len(values) :], strict=True)]


def _quantiles(
    values: Sequence[Tensor], ranges: Sequence[tuple[float, float]], count: int, total: Total
) -> list[Tensor]:
    """The middles of `count` parts of equal numbers of weights, by halving the range: float32 [count] each."""
    ordered = [v.float().sort().values for v in values]
    device = ordered[0].device
    shares = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / count
    wanted = (shares * _sizes(values, total)[:, None]).ceil()
    low = torch.tensor([[a] * count for a, _ in ranges], dtype=torch.float64, device=device)
    high = torch.tensor([[b] * count for _, b in ranges], dtype=torch.float64, device=device)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        below = [torch.searchsorted(o, m.float(), right=True) for o, m in zip(ordered, middle, strict=True)]
        enough = total(torch.stack(below)) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return list(high.float())


# -- storage -----------------------------------------------------------------------------------------------------------
def encode(weight: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(indices, codebook) of a `weight` that has only the values of `codebook` [k], k <= 256; `decode` gives it back.

    Indices take 1, 2, 4 or 8 bits for up to 2, 4, 16 or 256 values and come packed, uint8 [ceil(n * bits / 8)], the
    first in the highest bits. Raises `NotInCodebook` for any other value.
    """
    if len(codebook) > LARGEST:
        raise NotInCodebook(f"a codebook has at most {LARGEST} values, but this one has {len(codebook)}")
    wrong = clustered(weight, codebook) != weight
    if wrong.any():
        value = weight[wrong].flatten()[0].item()
        raise NotInCodebook(f"{int(wrong.sum())} weights, such as {value!r}, are not among the {len(codebook)} values")
    places = _places(codebook)
    indices = nearest(weight, codebook).flatten()
    whole = torch.nn.functional.pad(indices, (0, -len(indices) % len(places))).view(-1, len(places))
    return (whole << places).sum(1).to(torch.uint8), codebook


def decode(indices: Tensor, codebook: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of `shape` that `encode` was given, in the dtype of `codebook`."""
    places = _places(codebook)
    single = (indices[:, None].int() >> places) & (2 ** (8 // len(places)) - 1)
    return codebook[single.flatten()[: math.prod(shape)]].view(*shape)


def bits_for(size: int) -> int:
    """Bits of an index into a codebook of `size` values: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if 2**bits >= size)


def _places(codebook: Tensor) -> Tensor:
    """By how many bits each index of a byte is shifted: (0), (4, 0), (6, 4, 2, 0) or (7, …, 0)."""
    bits = bits_for(len(codebook))
    return torch.arange(8 - bits, -1, -bits, dtype=torch.int32, device=codebook.device)
