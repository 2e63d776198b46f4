"""From a recipe and a cluster to a job, and from a submitted job to the ledger. No torch: this runs on a login node."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ... import ShoestringError
from ...cluster import ClusterError
from ...cluster import launch as launching
from ...cluster.config.hardware import hardware
from ...cluster.config.sections import Cluster
from ...cluster.engine import JobRecord
from ...cluster.job import Job, make_job
from ...cluster.registry import shares_filesystem
from ...recipes import dump_recipe, load_recipe
from ..ledger import Ledger, RunIdentity

# from the first import to the first step, and from the last step to the exit; once a job
OVERHEAD_HOURS = 1 / 6
UNMEASURED_CHECKPOINT_SECONDS = 30.0


def job_for(
    recipe: str,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    nodes: int | None = None,
    hours: float | None = None,
    run_dir: Path | None = None,
    allow_code: bool = False,
    id: str | None = None,
) -> Job:
    """The job that runs a recipe on a cluster.

    The cluster's size, hardware and price go into the recipe, so that the run plans and accounts with what the job
    pays. `hours` None: what the recipe's budget lasts, and a tenth of that hour more; else the cluster's limit.
    """
    first = load_recipe(recipe, overrides, allow_code)
    strategy = first.strategy
    nodes = nodes or (strategy.nodes if strategy.nodes > 1 else None) or cluster.nodes
    devices = cluster.devices_per_node if strategy.devices == "auto" else strategy.devices
    price = cluster.usd_per_device_hour
    sizes = [f"strategy.nodes={nodes}", f"strategy.devices={devices}", f"cluster.hardware={cluster.hardware}"]
    if price is not None:
        sizes.append(f"cluster.usd_per_device_hour={price!r}")
    loaded = load_recipe(recipe, [*overrides, *sizes], allow_code)
    tasks = nodes * devices
    if loaded.strategy.name == "single" and tasks > 1:
        raise ClusterError(
            f"{loaded.where('strategy.name')}: strategy.name: found single; allowed with {nodes} nodes x {devices} "
            "devices: auto | ddp | zero1 | zero2 | zero3 | fsdp2"
        )
    _divides(loaded, nodes, devices)
    _fits(loaded)
    home = Path(run_dir or Path("runs") / loaded.name).absolute()
    return make_job(
        cluster,
        name=loaded.name,
        recipe=dump_recipe(loaded),
        run_dir=str(home),
        workdir=str(Path.cwd()),
        nodes=nodes,
        devices_per_node=devices,
        hours=hours or _hours(loaded, tasks, price, cluster),
        lead_seconds=lead_seconds(home, loaded.hash),
        python=sys.executable,
        spent_usd=launching.spent(home),
        arguments=("--allow-code",) if allow_code else (),
        recipe_hash=loaded.hash,
        home=os.environ.get("SHOESTRING_HOME", "") if shares_filesystem(cluster.engine) else "",
        exclude=launching.excluded(home),
        id=id,
    )


def _fits(recipe: Any) -> None:
    """Refuse what cannot fit into the memory of the devices that the job would pay for."""
    from ..machine.facts import facts
    from ..planning.fitting import CannotFit
    from ..planning.planner import plan

    try:
        if hardware(recipe.cluster.hardware).name != "cpu":  # whose memory is known there alone
            plan(recipe, facts())
    except CannotFit:
        raise
    except ShoestringError:
        return  # the job says it itself, where its files and packages are


def _divides(recipe: Any, nodes: int, devices: int) -> None:
    """Refuse what the plan on the node would refuse: a global batch, or its micro-batches, that the tasks cannot share.
    The batch is the same on any number of tasks, so that a run may go on with more of them or fewer."""
    tasks, batch, micro = nodes * devices, recipe.data.batch_size, recipe.data.micro_batch_size
    each = micro if isinstance(micro, int) else 1
    if batch % (tasks * each) == 0:
        return
    fitting = [n for n in range(1, batch // (each * devices) + 1) if batch % (n * devices * each) == 0]
    near = sorted(sorted(fitting, key=lambda n: abs(n - nodes))[:4])
    fits = (
        f"{' | '.join(map(str, near))} nodes with {devices} devices each" if near else f"fewer than {devices} devices"
    )
    micros = f" in micro-batches of {each}" if each > 1 else ""
    raise ClusterError(
        f"{recipe.where('data.batch_size')}: data.batch_size: found {batch}{micros}; allowed: a multiple of "
        f"{tasks * each}, for the job's {tasks} tasks ({nodes} nodes x {devices} devices); {fits} would fit"
    )


def _hours(recipe: Any, tasks: int, price: float | None, cluster: Cluster) -> float | None:
    """What the budget lasts on these devices, with what starting and ending take; None: it does not say."""
    budget = recipe.budget
    lasts = [budget.hours, budget.device_hours and budget.device_hours / tasks]
    if budget.usd and price:
        lasts.append(budget.usd / price / tasks)
    given = [hours for hours in lasts if hours]
    if not given:
        return None
    needed = min(given) * 1.1 + OVERHEAD_HOURS
    return min(needed, cluster.limits.hours or needed)


def lead_seconds(run_dir: Path, recipe_hash: str) -> int:
    """Return how many seconds before its end an attempt must begin to save: three times what saving took on earlier
    runs of this recipe (or may take), since disks are slowest when everybody saves."""
    seen = _measured(run_dir, recipe_hash)
    return math.ceil(3 * (seen if seen is not None else UNMEASURED_CHECKPOINT_SECONDS))


def _measured(run_dir: Path, recipe_hash: str) -> float | None:
    """The longest checkpoint and the longest step of this run, or else of the newest run of the recipe."""
    ledger = Ledger()
    known = [r for r in ledger.runs() if r.run_dir == str(run_dir)] or ledger.runs(recipe_hash=recipe_hash, limit=10)
    for run in known:
        saved = [
            row.fields.get("seconds_taken") for row in ledger.events(run.id) if row.fields.get("event") == "checkpoint"
        ]
        step = run.seconds / run.steps if run.seconds and run.steps else 0.0
        taken = [float(seconds) for seconds in saved if isinstance(seconds, int | float)]
        if taken:
            return max(taken) + step
    return None


def submit(job: Job) -> JobRecord:
    """Hand the job over and note it in the ledger, next to its run."""
    record = launching.submit(job)
    recipe = load_recipe(Path(job.job_dir) / "recipe.yaml", allow_code=True)
    RunIdentity.create_or_load(
        Path(job.run_dir), name=job.name, recipe_hash=job.recipe_hash, recipe=recipe.model_dump(mode="json")
    )
    Ledger().index(Path(job.run_dir))
    return record


def known_jobs() -> list[JobRecord]:
    """Every job of every run in the ledger, newest first; those in ./runs too, which another ledger may have seen."""
    records = {record.id: record for record in _indexed()}
    for run_dir in {*(Path(record.run_dir) for record in records.values()), *Path("runs").glob("*")}:
        records.update({record.id: record for record in launching.records(run_dir.absolute())})
    return sorted(records.values(), key=lambda record: -record.submitted)


def _indexed() -> Iterable[JobRecord]:
    for facts in Ledger().jobs():
        own = facts.pop("record")
        yield JobRecord(**own, facts=facts)


def status_fields(record: JobRecord, status: launching.Status) -> dict[str, Any]:
    """A job and where it stands, as plain values."""
    shown = {
        "id": record.id, "state": status.state, "detail": status.detail, "engine": record.engine,
        "engine_id": record.engine_id, "cluster": record.facts["cluster"], "nodes": record.facts["nodes"],
        "devices_per_node": record.facts["devices_per_node"], "on": list(status.nodes), "start": status.start,
        "submitted": record.submitted, "seconds": round(status.seconds, 1), "usd": status.usd,
        "run_dir": record.run_dir, "attempts": [
            {
                "number": a.number, "started": a.started, "ended": a.ended, "seconds": round(a.seconds, 1),
                "nodes": list(a.nodes), "code": a.code, "next": a.next, "reason": a.reason,
            }
            for a in status.attempts
        ],
    }  # fmt: skip
    return json.loads(json.dumps(shown))
