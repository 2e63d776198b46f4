"""When to prune: sparsity as a function of progress. Pure functions."""

from __future__ import annotations


def cubic(ramp: float, final: float, initial: float = 0.0) -> float:
    """s(t) = s_f + (s_i - s_f) (1 - t)^3: fast at first, slow at the end (arXiv 1710.01878, eq. 1)."""
    return final + (initial - final) * (1.0 - min(1.0, max(0.0, ramp))) ** 3
