"""How fast a few nodes reduce among themselves, in a group of their own that leaves no trace in the process."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from .health import within

# (bytes reduced, bytes a second below which no training is possible, and below which a pair is remarkable)
ON_CPUS = (2 * 2**20, 1e6, 1e7)
ON_GPUS = (64 * 2**20, 1e7, 1e9)
TIMES = 7


def bandwidth(store: Any, where: str, place: int, size: int, device: str, times: int, timeout: float) -> float:
    """Bytes a second of an all-reduce, as a link sees them: 2 (n - 1) / n times the bytes reduced, by the best of
    `times`. `where` names the group in `store`, in which this node is number `place` of `size`.

    Raises TimeoutError after `timeout` seconds, and what the library says against it.
    """
    made: list[Any] = []
    try:
        return within(timeout, _measure, store.clone(), where, place, size, device, times, timeout, made)
    finally:
        for group in made:
            within(timeout, group.abort if device != "cpu" else group.shutdown)


def _measure(store: Any, where: str, place: int, size: int, device: str, times: int, timeout: float, made: list[Any]
) -> float:  # fmt: skip
    import torch
    import torch.distributed as dist

    amount, _, _ = ON_CPUS if device == "cpu" else ON_GPUS
    prefixed = dist.PrefixStore(where, store)
    group: Any
    if device == "cpu":
        group = dist.ProcessGroupGloo(prefixed, place, size, timedelta(seconds=timeout))
    else:
        # our own clock runs out first: its watchdog would end the process instead of saying so
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=20 * timeout)
        group = dist.ProcessGroupNCCL(prefixed, place, size, options)
    made.append(group)
    buffer = torch.zeros(amount // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for turn in range(1 + times):
        began = time.perf_counter()
        group.allreduce([buffer]).wait()
        if device != "cpu":
            torch.cuda.synchronize(device)
        if turn:  # the first one connects
            best = min(best, time.perf_counter() - began)
    del buffer
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * (size - 1) / size * amount / best
