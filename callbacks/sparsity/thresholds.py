"""The exact k-th smallest score of tensors that are spread over ranks, without gathering them.

Non-negative floats order like their bit patterns, so the k-th smallest is found by bisecting 31 bits: each round
counts, over all ranks, how many scores lie below. 31 sums of one number a tensor replace a gather of every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def kth_smallest(scores: Sequence[Tensor], counts: Sequence[int], total: Callable[[Tensor], Tensor]) -> list[float]:
    """The `counts[i]`-th smallest value (1-based) of the union over ranks of each `scores[i]`, [n_i] float32 >= 0.

    `total` sums a tensor over the ranks (identity where each rank has everything). 0 gives -1.0: below every score.
    """
    if not scores:
        return []
    bits = [s.float().view(torch.int32) for s in scores]
    device = bits[0].device
    want = torch.tensor(counts, dtype=torch.int64, device=device)
    low = torch.zeros(len(bits), dtype=torch.int64, device=device)
    high = torch.full((len(bits),), 0x7F800000, dtype=torch.int64, device=device)  # +inf
    for _ in range(31):  # smallest pattern with at least `want` scores at or below it
        middle = (low + high) // 2
        below = torch.stack([(b <= m).sum() for b, m in zip(bits, middle, strict=True)])
        enough = total(below) >= want
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle + 1)
    values = high.to(torch.int32).view(torch.float32).tolist()
    return [value if count > 0 else -1.0 for value, count in zip(values, counts, strict=True)]
