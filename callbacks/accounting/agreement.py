"""Ranks agree without waiting: one small asynchronous sum a step, read one step later.

Signals, the budget's decisions and the global counters ride in one vector of float64 on a gloo group of its own, so
nothing here orders or delays the collectives of training. With one rank there is no collective at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """`exchange(values)` starts the sum of this step's values and returns the sums of the step before (None at first).

    With one rank it returns the values themselves at once. `lag` says how old an answer is, in steps.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.lag = 0 if self.world_size == 1 else 1
        self._group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self._pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self, values: Sequence[float]) -> list[float] | None:
        if self._group is None:
            return list(values)
        answer = self.settle()
        self.start(values)
        return answer

    def start(self, values: Sequence[float]) -> None:
        """Start the sum of `values`; `settle` gives it. Alone there is nothing to sum."""
        if self._group is not None:
            vector = torch.tensor(values, dtype=torch.float64)
            self._pending = (vector, dist.all_reduce(vector, group=self._group, async_op=True))

    def settle(self) -> list[float] | None:
        """The answer still under way, waited for; None if there is none."""
        if self._pending is None:
            return None
        vector, work = self._pending
        self._pending = None
        work.wait()
        return vector.tolist()

    def now(self, values: Sequence[float]) -> list[float]:
        """Sum `values` and wait: for starts and ends, never inside the step."""
        if self._group is None:
            return list(values)
        vector = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(vector, group=self._group)
        return vector.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank: for checkpoints, never inside the step."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def start_gather(self, values: Sequence[float]) -> Callable[[], list[list[float]]]:
        """Start gathering every rank's `values`; the call that is returned gives them, in rank order.

        Waits only if they are not there yet, so ask for them later.
        """
        if self._group is None:
            return lambda: [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        work = dist.all_gather(gathered, mine, group=self._group, async_op=True)

        def answer() -> list[list[float]]:
            work.wait()
            return [one.tolist() for one in gathered]

        return answer

    def close(self) -> None:
        self.settle()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
