"""What the terminal shows of jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from .display import console, dollars, seconds, show_fields


def show_jobs(jobs: Sequence[Mapping[str, Any]]) -> None:
    """One line a job, newest first."""
    table = Table(box=None, pad_edge=False)
    for column in ("id", "state", "engine", "size", "attempts", "time", "cost", "submitted", ""):
        table.add_column(column, overflow="fold", no_wrap=bool(column))
    for job in jobs:
        table.add_row(
            job["id"], job["state"], f"{job['engine']} {job['engine_id'].rpartition(':')[0] or job['engine_id']}",
            f"{job['nodes']} x {job['devices_per_node']}", str(len(job["attempts"])), seconds(job["seconds"]),
            dollars(job["usd"]), _moment(job["submitted"]), job["detail"],
        )  # fmt: skip
    console.print(table if jobs else "no jobs yet: shoestring launch RECIPE --cluster FILE")


def show_job(job: Mapping[str, Any]) -> None:
    """One job and each of its attempts."""
    show_fields({
        "job": job["id"], "state": f"{job['state']}  {job['detail']}".rstrip(), "run": job["run_dir"],
        "engine": f"{job['engine']} {job['engine_id']}",
        "size": f"{job['nodes']} nodes x {job['devices_per_node']} devices",
        "on": ", ".join(job["on"]) or "-", "spent": f"{seconds(job['seconds'])}, {dollars(job['usd'])}",
    })  # fmt: skip
    if job["start"]:
        show_fields({"expected to start": _moment(job["start"])})
    table = Table(box=None, pad_edge=False)
    for column in ("attempt", "began", "time", "nodes", "code", "then", "because"):
        table.add_column(column, overflow="fold", no_wrap=column != "because")
    for attempt in job["attempts"]:
        nodes = attempt["nodes"]
        shown = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
        table.add_row(
            str(attempt["number"]), _moment(attempt["started"]), seconds(attempt["seconds"]), shown,
            "-" if attempt["code"] is None else str(attempt["code"]), attempt["next"] or "running", attempt["reason"],
        )  # fmt: skip
    if job["attempts"]:
        console.print(table)


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
