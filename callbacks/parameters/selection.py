"""The largest of scores that are spread over ranks: exactly so many, without gathering them.

Floats order like their bit patterns once the negative ones are flipped, so the smallest score that is kept is found by
bisecting 32 bits: each round counts, over all ranks, how many scores lie at or above. 32 sums of one number a group
replace a gather of every weight. Equal scores are told apart by their position, so exactly as many are kept as asked,
and the same ones on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Piece = tuple[Tensor, int]  # scores [n] on this rank, and the position of the first among all of the group's
Total = Callable[[Tensor], Tensor]  # sums a tensor over the ranks

_LEAST = -(2**31)


def keep_largest(groups: Sequence[Sequence[Piece]], counts: Sequence[int], total: Total) -> list[list[Tensor]]:
    """Masks (bool, one a piece) of the `counts[i]` largest scores of the union over ranks of `groups[i]`.

    Of equal scores those at lower positions are kept. A count above the number of scores keeps all.
    """
    if not groups:
        return []
    keys = [[_key(score) for score, _ in pieces] for pieces in groups]
    device = keys[0][0].device
    want = torch.tensor(counts, dtype=torch.int64, device=device)

    def count(test: Callable[[int, int, Tensor], Tensor]) -> Tensor:
        counted = [sum(test(g, i, key).sum() for i, key in enumerate(of_group)) for g, of_group in enumerate(keys)]
        return total(torch.stack([torch.as_tensor(n, device=device) for n in counted]).to(torch.int64))

    threshold = _threshold(keys, want, total)
    above = count(lambda g, i, key: key > threshold[g])
    ties = count(lambda g, i, key: key == threshold[g])
    needed = (want - above).minimum(ties)
    last = torch.full_like(want, 2**40)
    if bool((needed < ties).any()):  # the same on every rank

        def tied_before(at: Tensor) -> Tensor:
            return count(lambda g, i, key: (key == threshold[g]) & (_indices(groups[g][i]) < at[g])) <= needed

        last = _largest(torch.zeros_like(want), last, tied_before, 41)
    return [
        [
            (key > threshold[g]) | ((key == threshold[g]) & (_indices(groups[g][i]) < last[g]))
            for i, key in enumerate(of_group)
        ]
        for g, of_group in enumerate(keys)
    ]


def peaks(scores: Sequence[Tensor], total: Total) -> list[float]:
    """The largest value of each, over all ranks; exact in float32, -inf where no rank has any."""
    if not scores:
        return []
    keys = [[_key(score)] for score in scores]
    thresholds = _threshold(keys, torch.ones(len(keys), dtype=torch.int64, device=scores[0].device), total)
    bits = thresholds ^ ((thresholds >> 31) & 0x7FFFFFFF)
    return torch.where(thresholds == _LEAST, -torch.inf, bits.to(torch.int32).view(torch.float32)).tolist()


def _threshold(keys: Sequence[Sequence[Tensor]], want: Tensor, total: Total) -> Tensor:
    """The largest keys that at least `want` of each group's lie at or above; the least there is if it has fewer."""

    def enough(at: Tensor) -> Tensor:
        counted = [sum((key >= at[g]).sum() for key in of_group) for g, of_group in enumerate(keys)]
        return total(torch.stack([torch.as_tensor(n, device=want.device) for n in counted]).to(torch.int64)) >= want

    least = torch.full_like(want, _LEAST)
    return _largest(least, least.neg() - 1, enough, 32)


def _largest(low: Tensor, high: Tensor, holds: Callable[[Tensor], Tensor], rounds: int) -> Tensor:
    """The largest numbers in [low, high] for which `holds`, which does for `low` and stops doing so once."""
    for _ in range(rounds):
        middle = low + (high - low + 1) // 2
        yes = holds(middle)
        low = torch.where(yes, middle, low)
        high = torch.where(yes, high, middle - 1)
    return low


def _key(score: Tensor) -> Tensor:
    """Integers [n] in the order of the scores; -0 counts as 0."""
    bits = (score.detach().float() + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)


def _indices(piece: Piece) -> Tensor:
    score, start = piece
    return torch.arange(start, start + score.numel(), device=score.device)
