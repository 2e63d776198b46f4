"""How fast a device should multiply matrices, for a plan: it loads no torch to find out.

A device of the catalogue has its figure there. For a CPU, numpy multiplies on one thread and the cores are counted; a
run measures with torch, and its own figure stands in its report.
"""

from __future__ import annotations

import platform
import sys
import time

from ...cgroups import usable_cpus
from ...cluster.config.hardware import hardware
from ...directories import home
from .facts import cpu_model, peak, read_peaks, version, write_peaks

SECONDS = 0.1
SIDE = 512


def expected_peak(dtype: str, name: str) -> float:
    """Dense FLOP/s of one device, `name` of the catalogue, in `dtype`."""
    known = hardware(name).peak_flops.get(dtype)
    if known is not None:
        return known
    if dtype != "fp32" or "torch" in sys.modules:  # numpy has no 16 bits that a CPU multiplies fast
        return peak(dtype, name)[0]
    store = home() / "peaks.json"
    key = f"{cpu_model()}|{platform.node()}|numpy{version('numpy')}|{dtype}|a thread"
    one = read_peaks(store).get(key)
    if one is None:
        one = _one_thread()
        write_peaks(store, {key: one})
    return one * usable_cpus()


def _one_thread() -> float:
    """The best of repeated square products on one thread, by the time that it computed, not the time it waited."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    matrix = np.linspace(-1, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    product, best, began = np.empty_like(matrix), 0.0, time.thread_time()
    with threadpool_limits(1):
        while time.thread_time() - began < SECONDS:
            started = time.thread_time()
            np.matmul(matrix, matrix, out=product)
            best = max(best, 2 * SIDE**3 / (time.thread_time() - started))
    return best
