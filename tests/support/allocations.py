"""What torch has allocated on the host and not freed yet, followed event by event: an exact peak, with no noise of the
interpreter's. What is mapped from files is not among it.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


class Allocated:
    """peak: the most bytes alive at once. kept: alive at the end."""

    peak = kept = 0


@contextmanager
def allocations(maps: Collection[int] = ()) -> Iterator[Allocated]:
    """Follow what this process's tensors take, from nothing. maps: sizes of files whose maps torch tells of."""
    seen = Allocated()
    gc.collect()  # or it is freed meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield seen
    events = [
        e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and abs(e.nbytes()) not in maps
    ]
    for event in sorted(events, key=lambda e: e.start_ns()):
        seen.kept += event.nbytes()
        seen.peak = max(seen.peak, seen.kept)
