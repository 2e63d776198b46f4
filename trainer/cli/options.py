"""Options that several commands share, and how they print JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer


def _recipes(incomplete: str) -> list[str]:
    """Recipes to complete in a shell: shipped ones, and files here."""
    from ...recipes import shipped_recipes

    return [name for name in (*shipped_recipes(), *map(str, Path().glob("*.yaml"))) if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Runs to complete in a shell: those in runs/ here."""
    return [name for path in Path("runs").glob("*/run.json") if (name := str(path.parent)).startswith(incomplete)]


RecipePath = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", autocompletion=_recipes),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the recipe.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Let the recipe name your own module:attr.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def stdout_to_stderr(as_json: bool) -> Iterator[None]:
    """Send what libraries print to the error output where JSON is to come: DeepSpeed logs to stdout."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def as_json_text(value: Any) -> str:
    """Strict JSON: what is not finite is null."""
    from ..ledger.lines import finite

    return json.dumps(finite(value), indent=1)


def print_json(value: Any) -> None:
    typer.echo(as_json_text(value))
