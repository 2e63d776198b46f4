"""The command line. Commands import what they need when they run, so `--help` answers at once and without torch."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import ShoestringError, __version__
from ...exits import FAILURE
from . import jobs as job_commands
from . import models as model_commands
from . import recipes as recipe_commands
from . import runs as run_commands
from . import text as text_commands
from .data import data
from .options import AllowCode, AsJson, Overrides, RecipePath, as_json_text, print_json
from .start import init
from .verify import verify

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train and fine-tune models under a budget: plan before spending, never overspend, end annealed.",
)
runs_app = typer.Typer(no_args_is_help=True, help="What every run did and cost.")
recipes_app = typer.Typer(no_args_is_help=True, help="The shipped recipes, and checking your own.")
app.add_typer(runs_app, name="runs")
app.add_typer(recipes_app, name="recipes")

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report here as JSON.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="The run's directory; default runs/<recipe name>.")]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    report_file: JsonFile = None,
    allow_code: AllowCode = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although data, code, settings or packages have changed.")
    ] = False,
) -> None:
    """Run a recipe to the end of its budget. The same command again resumes what was interrupted.

    Exit codes: 0 finished, 1 failure, 2 bad input, 85 saved - run me again, 86 this node is bad.
    """
    from ...recipes import load_recipe

    loaded = load_recipe(recipe, overrides or (), allow_code)
    home = run_dir or Path("runs") / loaded.name
    if _already_finished(home, loaded, report_file):
        return
    from ..jobs.worker import preflight
    from ..machine import local_ranks
    from ..machine.facts import is_first
    from ..planning.planner import plan
    from ..run.fit import fit
    from .display import Bar, show_plan, show_report

    made = plan(loaded)
    first = is_first()
    if first:
        show_plan(made)
    checked = preflight()
    local_ranks.start(made.devices, made.nodes)
    bar = Bar(made.budget.given()) if first else None
    try:
        report = fit(
            made, run_dir=home, display=bar, startup_seconds=_seconds_alive(), measurements=checked,
            accept_changes=accept_changes,
        )  # fmt: skip
    finally:
        if bar is not None:
            bar.close()
    if report is not None:
        show_report(report)
        _conclude(report, report_file)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a few real steps to replace the predictions.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Print every choice with its reason and what the run should need. Starts nothing."""
    from ...recipes import load_recipe
    from ..planning.planner import plan as make_plan

    made = make_plan(load_recipe(recipe, overrides or (), allow_code))
    if measure:
        from ..run.measured import measured

        made = measured(made)
    if as_json:
        print_json(made.as_dict())
    else:
        from .display import show_plan

        show_plan(made)


app.command()(init)
app.command()(verify)
app.command()(data)


recipes_app.command("list")(recipe_commands.list_recipes)
recipes_app.command("show")(recipe_commands.show)
recipes_app.command("schema")(recipe_commands.schema)
recipes_app.command("validate")(recipe_commands.validate)
app.command()(text_commands.generate)
app.command()(text_commands.chat)
app.command()(model_commands.export)
app.command()(model_commands.measure)
app.command()(model_commands.compress)
runs_app.command("list")(run_commands.list_runs)
runs_app.command("show")(run_commands.show)
runs_app.command("rebuild")(run_commands.rebuild)
runs_app.command("pareto")(model_commands.pareto)
app.command()(job_commands.launch)
app.command()(job_commands.jobs)
app.command()(job_commands.logs)
app.command()(job_commands.cancel)


@app.command()
def doctor(
    nvme: Annotated[
        Path | None, typer.Option(help="A folder for strategy.nvme: build async_io, write there and read it back.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this machine has, what is missing, and the command that fixes it."""
    from ..machine.doctor import diagnose, report

    findings = diagnose(nvme=nvme)
    if as_json:
        print_json(report(findings))
    else:
        from .display import show_findings

        show_findings(findings)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(FAILURE)


@app.command()
def techniques() -> None:
    """The table of techniques: what each does, saves and keeps."""
    from .technique_table import technique_table

    typer.echo(technique_table())


def _version(shown: bool) -> None:
    if shown:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["SHOESTRING_DEBUG"] = "1"


def main() -> None:
    """Entry point: our own errors are one message and their exit code, mostly 2, without a traceback."""
    with _hearing_signals():
        try:
            app()
        except ShoestringError as error:
            if os.environ.get("SHOESTRING_DEBUG"):
                raise
            from ..machine.facts import is_first

            if getattr(error, "told_here", is_first()):  # many ranks may have met it
                print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except Exception as error:
            if getattr(error, "told_here", True):
                raise
            sys.exit(FAILURE)


def _hearing_signals() -> AbstractContextManager[None]:
    """What surrounds a training, and a task of a job; for everybody else nothing, and nothing to import."""
    if "SHOESTRING_JOB_DIR" in os.environ:
        from ..jobs.worker import as_task

        return as_task()
    if "train" not in sys.argv[1:3]:  # `--debug` may come first
        return nullcontext()
    from ..machine.signals import listening

    return listening()


def _already_finished(home: Path, recipe: Any, report_file: Path | None) -> bool:
    """A run that has reached its end is shown again, not run again."""
    from ..ledger.report import finished_report
    from ..machine.facts import is_first

    report = finished_report(home, recipe)
    if report is None:
        return False
    if is_first():
        from .display import show_report

        typer.echo(f"{home} is finished; give another --run-dir to run it again")
        show_report(report)
        _conclude(report, report_file)
    return True


def _conclude(report: Any, report_file: Path | None) -> None:
    """Write the report as JSON where that is asked for, and end with what is wrong with the run, if anything is."""
    if report_file is not None:
        _write_json(report_file, report.as_dict())
    if report.problems:
        print(*(f"error: {problem}" for problem in report.problems), sep="\n", file=sys.stderr)
        raise typer.Exit(FAILURE)


def _seconds_alive() -> float:
    """Seconds since this process began: a bill runs from there, not from the first step.

    By a clock that nobody sets: one that is put right while the process starts would be charged to the run.
    """
    import time

    if sys.platform == "linux":
        since_boot = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        ticks = os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(since_boot) / ticks)
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json_text(value) + "\n")
