"""Loader workers: whose signals end them."""

import subprocess

from small import samples
from torch.utils.data import DataLoader

from shoestring.callbacks.sampling.workers import shield


def test_a_worker_is_ended_by_its_own_process_and_by_nobody_else():
    loader = DataLoader(samples(), 4, num_workers=1)
    shield(loader)
    shield(loader)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    subprocess.run(["bash", "-c", f"kill -TERM {worker.pid}; kill -USR1 {worker.pid}"], check=True)  # a scheduler
    assert sum(len(batch[1]) for batch in batches) == 60
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
