"""The commands about jobs: launch, jobs, logs, cancel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AllowCode, AsJson, print_json

JobName = Annotated[str, typer.Argument(metavar="JOB", help="Id, start of an id, or the engine's own id.")]


def launch(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to it.")] = None,
    cluster: Annotated[Path, typer.Option("--cluster", metavar="FILE", help="Where to run: a cluster file.")] = ...,  # type: ignore[assignment]
    nodes: Annotated[
        int | None, typer.Option(help="How many nodes; default: the recipe's, else the cluster's.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(help="The job's hours in total; default: as long as the budget lasts.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="The run's directory, on shared storage.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and what it costs.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe on a cluster: many nodes, watched, saved and run again when it is preempted.

    Refuses a job whose worst case costs more than the cluster file's cap.
    """
    from ...cluster import launch as launching
    from ...cluster.job import refuse_over_cap
    from ...cluster.load import load_cluster
    from ...cluster.registry import engine
    from ..jobs.submit import job_for, submit

    place = load_cluster(cluster)
    job = job_for(recipe, overrides or (), place, nodes=nodes, hours=hours, run_dir=run_dir, allow_code=allow_code)
    text = launching.dry_run(job) if dry_run else ""
    remarks = [*refuse_over_cap(job), *engine(place.engine).remarks(job)]
    if dry_run:
        typer.echo(text)
        for remark in remarks:
            print(f"# {remark}", file=sys.stderr)
        return
    record = submit(job)
    if as_json:
        print_json({"id": record.id, "engine": record.engine, "engine_id": record.engine_id, "run_dir": job.run_dir,
                    "remarks": remarks})  # fmt: skip
        return
    for remark in remarks:
        typer.echo(remark)
    typer.echo(f"{record.id} submitted to {place.name} ({record.engine} {record.engine_id})")
    typer.echo(f"follow it: shoestring logs -f {record.id}")


def jobs(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job, with its attempts.")] = None,
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(help="At most this many.")] = 20,
) -> None:
    """Every job and where it stands; with JOB: that one and its attempts over requeues."""
    from ...cluster.launch import find, status
    from ..jobs.submit import known_jobs, status_fields

    known = known_jobs()
    wanted = [find(job, known)] if job else known[:limit]
    statuses = [status_fields(record, status(record)) for record in wanted]
    if as_json:
        print_json(statuses[0] if job else statuses)
        return
    from .job_display import show_job, show_jobs

    if job:
        show_job(statuses[0])
    else:
        show_jobs(statuses)


def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow the output until the job ends.")] = False,
) -> None:
    """The output of a job, all its attempts."""
    from ...cluster.launch import find
    from ...cluster.launch import logs as job_logs

    for line in job_logs(_record_of(find, job), follow):
        typer.echo(line)


def cancel(job: JobName) -> None:
    """End a job. It saves first, and is not run again; `launch` with the same run directory goes on from there."""
    from ...cluster.launch import cancel as cancel_job
    from ...cluster.launch import find

    record = _record_of(find, job)
    cancel_job(record)
    typer.echo(f"{record.id} has got the signal to save and end")


def _record_of(find: Any, job: str) -> Any:
    from ..jobs.submit import known_jobs

    return find(job, known_jobs())
