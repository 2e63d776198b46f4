"""Where to prune: the share of weights each layer keeps, so that all of them together keep 1 - sparsity."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]

NAMES = ("uniform", "erk", "global")


def densities(distribution: str | Mapping[str, float], shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Density by name. `distribution`: uniform | erk, or name patterns with each its own sparsity.

    Under a mapping, layers that match no pattern get `sparsity`, and the first pattern that matches decides.
    """
    if distribution == "uniform":
        return dict.fromkeys(shapes, 1.0 - sparsity)
    if distribution == "erk":
        return erk(shapes, sparsity)
    if isinstance(distribution, str):
        raise ValueError(f"distribution={distribution!r} has no densities; use one of {', '.join(NAMES)}")

    def own(name: str) -> float:
        matching = (share for pattern, share in distribution.items() if fnmatch.fnmatch(name, pattern))
        return 1.0 - next(matching, sparsity)

    return {name: own(name) for name in shapes}


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdős-Rényi-kernel: a layer's density is proportional to sum(shape) / prod(shape) (arXiv 1911.11134).

    Layers that would be more than dense are dense, and the others make up for it.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        left = (1.0 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = left / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        over = {name for name in shapes if name not in dense and raw[name] * scale > 1.0}
        if not over:
            return {name: 1.0 if name in dense else raw[name] * scale for name in shapes}
        dense |= {max(over, key=lambda name: raw[name])}
    return dict.fromkeys(shapes, 1.0)


def keep(shares: Mapping[str, float], shapes: Shapes) -> dict[str, int]:
    """Return how many weights each layer keeps: what is pruned is rounded down."""
    sizes = {name: math.prod(shapes[name]) for name in shares}
    return {name: sizes[name] - math.floor((1.0 - share) * sizes[name] + 1e-9) for name, share in shares.items()}
