"""A job: one spec from which nodes, tasks, devices and every engine's words for them are derived."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from .config.document import ClusterError
from .config.sections import Cluster

# a warning shorter than this saves nothing: the step has to end, and a checkpoint to be written
LEAST_LEAD = 30


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run, and where. `task` is one process on one device; there are `nodes * devices_per_node` of them.

    id              unique, fits a DNS label: `<run name>-<6 hex digits>`
    recipe          the whole recipe as YAML, with this job's nodes, devices and price in it
    run_dir         the run's home, on storage that all nodes share; the job's own files are in `job_dir` below it
    hours           what the job may take in all its attempts; `attempt_hours` what one of them may
    lead_seconds    how long before its end an attempt gets the signal to save
    spent_usd       what earlier jobs of the same run have cost
    python          the interpreter the processes start with
    home            `SHOESTRING_HOME` of the tasks; empty: their own default
    exclude         nodes that earlier jobs of the run have found bad
    """

    id: str
    name: str
    cluster: Cluster
    recipe: str
    run_dir: str
    workdir: str
    nodes: int
    devices_per_node: int
    hours: float
    lead_seconds: int
    python: str = "python3"
    spent_usd: float = 0.0
    arguments: tuple[str, ...] = ()  # more of them for `shoestring train`
    recipe_hash: str = ""
    home: str = ""
    exclude: tuple[str, ...] = ()
    attempt_hours: float = field(default=0.0)

    def __post_init__(self) -> None:
        limit = self.cluster.limits.attempt_hours
        object.__setattr__(self, "attempt_hours", min(self.hours, limit or self.hours))

    @property
    def tasks(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def job_dir(self) -> str:
        return str(PurePosixPath(self.run_dir, "jobs", self.id))

    @property
    def attempt_seconds(self) -> int:
        """Seconds of one attempt; the engine's time limit."""
        return max(1, math.floor(self.attempt_hours * 3600))

    @property
    def requeues(self) -> int:
        return self.cluster.limits.requeues

    @property
    def on_gpus(self) -> bool:
        return self.cluster.hardware != "cpu"

    def train(self, recipe: str | None = None) -> list[str]:
        """The command of one task."""
        path = recipe or str(PurePosixPath(self.job_dir, "recipe.yaml"))
        return [
            self.python, "-m", "shoestring.trainer.cli", "train", path, "--run-dir", self.run_dir, *self.arguments
        ]  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Return what is kept of the job beside its run; never a secret's value."""
        return {
            "id": self.id, "name": self.name, "cluster": self.cluster.name, "engine": self.cluster.engine,
            "run_dir": self.run_dir, "workdir": self.workdir, "nodes": self.nodes,
            "devices_per_node": self.devices_per_node, "hours": self.hours, "attempt_hours": self.attempt_hours,
            "lead_seconds": self.lead_seconds, "requeues": self.requeues, "hardware": self.cluster.hardware,
            "usd_per_device_hour": self.cluster.usd_per_device_hour, "spent_usd": self.spent_usd,
            "recipe_hash": self.recipe_hash, "secrets": sorted(self.cluster.secrets),
            "options": self.cluster.options.model_dump(mode="json"),
            "preflight": self.cluster.preflight.model_dump(mode="json"),
        }  # fmt: skip


def new_id(name: str) -> str:
    """An id for a job of the run `name` that every engine accepts as a name."""
    plain = "".join(c if c.isalnum() and c.isascii() else "-" for c in name.lower()).strip("-")[:30].strip("-")
    return f"{plain or 'run'}-{uuid.uuid4().hex[:6]}"


def make_job(
    cluster: Cluster,
    *,
    name: str,
    recipe: str,
    run_dir: str,
    workdir: str,
    nodes: int | None = None,
    devices_per_node: int | None = None,
    hours: float | None = None,
    lead_seconds: int = 0,
    python: str = "python3",
    spent_usd: float = 0.0,
    arguments: tuple[str, ...] = (),
    recipe_hash: str = "",
    home: str = "",
    exclude: tuple[str, ...] = (),
    id: str | None = None,
) -> Job:
    """A job within the cluster's limits; ClusterError where what is asked for exceeds them, or cannot be known."""
    nodes, devices = nodes or cluster.nodes, devices_per_node or cluster.devices_per_node
    most = cluster.limits.nodes
    if most is not None and nodes > most:
        raise ClusterError(f"{nodes} nodes; allowed on {cluster.name}: at most {most} (limits.nodes)")
    if devices > cluster.devices_per_node:
        raise ClusterError(
            f"{devices} devices a node; allowed on {cluster.name}: at most {cluster.devices_per_node} "
            "(devices_per_node). Use more nodes."
        )
    hours = hours or cluster.limits.hours
    if hours is None:
        raise ClusterError("how long may the job take? Give --hours, budget.hours in the recipe, or limits.hours")
    if cluster.limits.hours is not None and hours > cluster.limits.hours + 1e-9:
        raise ClusterError(f"{hours:g} h; allowed on {cluster.name}: at most {cluster.limits.hours:g} h (limits.hours)")
    attempt = min(hours, cluster.limits.attempt_hours or hours)
    lead = max(LEAST_LEAD, lead_seconds)
    if attempt * 3600 <= 2 * lead:
        raise ClusterError(
            f"an attempt of {attempt * 3600:.0f} s, of which the last {lead} s are for saving: nothing would be "
            "trained. Give more hours."
        )
    environment = cluster.environment
    if environment.python:
        python = environment.python
    elif environment.venv or environment.container:
        python = "python3"
    return Job(
        id=id or new_id(name), name=name, cluster=cluster, recipe=recipe, run_dir=run_dir,
        workdir=cluster.workdir or workdir, nodes=nodes, devices_per_node=devices, hours=hours, lead_seconds=lead,
        python=python, spent_usd=spent_usd, arguments=arguments, recipe_hash=recipe_hash,
        home=home, exclude=exclude,
    )  # fmt: skip


def worst_case(job: Job) -> tuple[float | None, list[str]]:
    """(US dollars that the run has cost when this job has used all its hours; None: no price known), the arithmetic."""
    price = job.cluster.usd_per_device_hour
    sizes = f"{job.nodes} nodes x {job.devices_per_node} devices x {job.hours:g} h"
    if price is None:
        return None, [f"{sizes} = {job.tasks * job.hours:g} device-hours; no price is known for {job.cluster.hardware}"]
    total = job.tasks * job.hours * price
    lines = [f"{sizes} x ${price:g} a device-hour = ${total:.2f} at most"]
    if job.spent_usd:
        lines.append(
            f"${job.spent_usd:.2f} spent by earlier jobs of this run + ${total:.2f} = ${job.spent_usd + total:.2f}"
        )
    return job.spent_usd + total, lines


def refuse_over_cap(job: Job) -> list[str]:
    """The arithmetic of the job's worst case; ClusterError, with it, if that is above the cluster's `limits.usd`."""
    total, lines = worst_case(job)
    cap = job.cluster.limits.usd
    if cap is None:
        return lines
    if total is None:
        raise ClusterError(
            f"{lines[0]}. limits.usd is ${cap:g}, which cannot be checked without a price: "
            "set price.usd_per_device_hour"
        )
    if total > cap:
        within = max(0.0, (cap - job.spent_usd) / (job.tasks * (job.cluster.usd_per_device_hour or 1)))
        raise ClusterError(
            f"too expensive for {job.cluster.name}: {'; '.join(lines)}; the cap is ${cap:.2f} (limits.usd). "
            f"--hours {math.floor(within * 100) / 100:g} would fit."
        )
    return [*lines, f"the cap is ${cap:.2f}: within it"]


def as_time(seconds: float) -> str:
    """`days-hours:minutes:seconds`, as schedulers write it: 5400 -> "1:30:00"."""
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def secret_sources(cluster: Cluster) -> Mapping[str, str]:
    """Return the source of each secret, in words; for dry runs."""
    return {
        name: f"the environment variable {spec.env}" if spec.env else f"the file {spec.file}"
        for name, spec in cluster.secrets.items()
    }
