"""What a task of a job does before it trains, as a node of its own: for tests of the pre-flight."""

import json
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_script
from processes import last_words, run

from shoestring.cluster.config.sections import PreflightSpec
from shoestring.cluster.preflight import check as cluster_preflight
from shoestring.trainer.jobs.worker import as_task, preflight


def make_job(folder: Path, nodes: int, devices: int = 1, **limits: object) -> Path:
    """A job's folder below a run's, as `launch.submit` leaves it, as far as a task reads it."""
    job_dir = folder / "run" / "jobs" / "job-1"
    job_dir.mkdir(parents=True)
    spec = PreflightSpec.model_validate(limits).model_dump(mode="json")
    facts = {"nodes": nodes, "devices_per_node": devices, "hardware": "cpu", "run_dir": str(folder / "run")}
    (job_dir / "job.json").write_text(json.dumps({**facts, "preflight": spec}))
    names = [f"n{i + 1}" for i in range(nodes)]
    (job_dir / "attempts.jsonl").write_text(json.dumps({"attempt": 0, "started": time.time(), "nodes": names}) + "\n")
    return job_dir


def state() -> list[object]:
    """What pre-flight must leave as it was."""
    return [
        torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads(),
        str(torch.get_default_dtype()), torch.distributed.is_initialized(), torch.is_grad_enabled(),
    ]  # fmt: skip


def node(
    job_dir: Path, *, devices: int = 1, missing: tuple = (), dies: int = -1, ahead: dict | None = None,
    train: Path | None = None, **variables: str,
) -> None:  # fmt: skip
    """One task; it leaves what it saw in `seen-RANK.json`.

    missing: ranks that never come; dies: one that is gone when it is asked to reduce; ahead: seconds by rank that a
    node's clock is; train: a folder for a training afterwards.
    """
    rank = int(os.environ["RANK"])
    if rank in missing:
        return
    number, before = rank // devices, dict(os.environ)
    os.environ.update(
        variables, NODE_RANK=str(number), LOCAL_RANK=str(rank % devices), SHOESTRING_NODE=f"n{number + 1}"
    )
    os.environ.update(SHOESTRING_JOB="job-1", SHOESTRING_JOB_DIR=str(job_dir), SHOESTRING_ATTEMPT="0")
    os.environ.pop("TORCHELASTIC_RUN_ID", None)  # as_task would have it die with the fork server
    if (ahead or {}).get(rank):
        right = time.time
        time.time = lambda: right() + ahead[rank]  # type: ignore[index]
    if dies == rank:
        plain = cluster_preflight.answer
        cluster_preflight.answer = lambda task, store, request: (
            os._exit(9) if request["what"] == "allreduce" else plain(task, store, request)
        )
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    untouched, began = state(), time.perf_counter()
    with as_task():
        rows = preflight()
        seen = {"rows": rows, "same": state() == untouched, "seconds": time.perf_counter() - began}
        (job_dir / f"seen-{rank}.json").write_text(json.dumps(seen))
    if train is not None:
        os.environ.update({key: before[key] for key in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID")})
        del os.environ["NODE_RANK"], os.environ["SHOESTRING_JOB_DIR"]
        plain_training(train)


def fly(
    folder: Path, nodes: int, devices: int = 1, limits: dict | None = None, **options: Any
) -> tuple[list, Path, str]:
    """Processes that are nodes: (exit codes, the job's folder, what they said)."""
    job_dir = make_job(folder, nodes, devices, **(limits or {}))
    target = partial(node, job_dir, devices=devices, **options)
    codes = run(target, world=nodes * devices, folder=folder)
    return codes, job_dir, last_words(folder)


def verdict(job_dir: Path) -> dict[str, Any]:
    return json.loads((job_dir / "attempts" / "0" / "preflight.json").read_text())


def plain_training(folder: Path) -> None:
    """Two ranks, dropout, random samples."""
    train_script.train(folder, strategy="ddp", devices=2, workers=0)
