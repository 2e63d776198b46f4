"""`shoestring verify`: the command, and the table it ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ...exits import FAILURE
from .options import AllowCode, AsJson, Overrides, RecipePath, print_json, stdout_to_stderr

if TYPE_CHECKING:
    from ..run.verify.compare import Difference
    from ..run.verify.verdict import Verdict

Ranks = Annotated[
    int | None, typer.Option("--ranks", min=1, help="The most ranks to run on; default: as planned, at least 2.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each run; the third ends an epoch.")]


def verify(
    recipe: RecipePath,
    overrides: Overrides = None,
    ranks: Ranks = None,
    steps: Steps = 4,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
) -> None:
    """Compare a recipe with itself: a few steps on one rank, and on several, accumulated, sharded and unpacked.

    Losses, gradients and weights must be equal, but for rounding; else the first that differs is named, and the command
    fails. Nothing is kept, and nothing is charged.
    """
    from ...recipes import load_recipe
    from ..run.verify.verify import verify as run

    with stdout_to_stderr(as_json):
        verdict = run(
            load_recipe(recipe, overrides or (), allow_code),
            ranks=ranks,
            steps=steps,
            say=lambda name: typer.echo(f"running {name}", err=True),
        )
    if verdict is None:  # not rank 0
        return
    if as_json:
        print_json(verdict.as_dict())
    else:
        show(verdict)
    for problem in verdict.problems:
        typer.echo(f"error: {problem}", err=True)
    if verdict.problems:
        raise typer.Exit(FAILURE)


def show(verdict: Verdict) -> None:
    """One line a run: whether it is equal, and how far it is from that."""
    from rich.table import Table

    from .display import console, seconds

    title = f"verify: {verdict.recipe}, {verdict.steps} steps in {verdict.dtype}"
    table = Table(title=title, title_justify="left", expand=False)
    for column in ("run", "changes", "against", "verdict", "largest difference", "time"):
        table.add_column(column, overflow="fold")
    for outcome in verdict.outcomes:
        variant = outcome.variant
        far = outcome.why.splitlines()[0] if outcome.why else _largest(outcome.largest)
        table.add_row(
            variant.name, variant.axis, outcome.against, outcome.status, far, seconds(outcome.seconds or None)
        )
    console.print(table)
    for note in verdict.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)


def _largest(differences: list[Difference]) -> str:
    """The largest difference of each kind, where there is any."""
    measured = [f"{difference.kind} {difference.off:.1e}" for difference in differences if difference.off > 0]
    return ", ".join(measured) or "none"
