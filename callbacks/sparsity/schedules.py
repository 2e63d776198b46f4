"""When to prune: sparsity and drop fractions as functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..accounting.clock import Clock, Duration
from ..contract import Technique, require


@dataclass(frozen=True)
class Ramp:
    """The part of a run in which sparsity rises: what the settings `start`, `end` and `every` of a technique say."""

    start: Duration
    end: Duration

    @classmethod
    def of(cls, technique: Technique, start: str, end: str, every: int) -> Ramp:
        """From a technique's settings.

        Raises:
            BadSetting: `end` is no later moment than `start` in the same unit, or `every` not a positive number.
        """
        require(every > 0, technique, "every", "a positive number of steps")
        first, last = Duration.parse(start), Duration.parse(end)
        legal = first.counts == last.counts and first.amount < last.amount
        require(legal, technique, "end", f"a later moment than start={start!r}, in the same unit")
        return cls(first, last)

    def sparsity(self, clock: Clock, final: float, shape: Callable[[float, float], float]) -> float:
        """Return the sparsity now: 0 before `start`, `final` from `end` on, by `shape` (such as `cubic`) in between."""
        if clock.toward(self.start) < 1.0:
            return 0.0
        first = self.start.amount / self.end.amount
        return shape((clock.toward(self.end) - first) / (1.0 - first), final)


def cubic(ramp: float, final: float, initial: float = 0.0) -> float:
    """s(t) = s_f + (s_i - s_f) (1 - t)^3: fast at first, slow at the end (arXiv 1710.01878, eq. 1)."""
    return final + (initial - final) * (1.0 - min(1.0, max(0.0, ramp))) ** 3


def one_shot(ramp: float, final: float, initial: float = 0.0) -> float:
    """All at once, when the ramp has ended."""
    return final if ramp >= 1.0 else initial


def cosine_decay(ramp: float, start: float) -> float:
    """start / 2 (1 + cos(pi t)), from `start` at 0 to 0 at 1 (arXiv 1911.11134, eq. 1)."""
    return start / 2 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, ramp))))


def rounds(done: int, of: int, final: float) -> float:
    """Sparsity after `done` of `of` rounds that each keep the same share of what is left (arXiv 1803.03635)."""
    return 1.0 - (1.0 - final) ** (done / of)
