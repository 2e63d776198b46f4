"""Loader workers outlive the signals that are meant for the training process.

A scheduler tells every process of a job that it is to end (Slurm does at a preemption). The training process then still
needs batches until its step is over; torch's workers would be gone, and the run would crash instead of saving.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class Shielded:
    """Called by a loader first in each worker, around its own `worker_init_fn`."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.own = own

    def __call__(self, worker: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        if self.own is not None:
            self.own(worker)


def _end_with_parent(parent: int) -> None:
    """SIGTERM ends this process if its own parent has sent it, as a loader does with workers that do not answer."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def shield(loader: DataLoader[Any]) -> None:
    """Shield the workers that `loader` will start. Done twice is done once."""
    able = hasattr(signal, "sigwaitinfo")  # not on macOS
    if able and loader.num_workers and not isinstance(loader.worker_init_fn, Shielded):
        loader.worker_init_fn = Shielded(loader.worker_init_fn)
