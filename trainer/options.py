"""Options that several commands share, and how they print JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

AllowCode = Annotated[bool, typer.Option("--allow-code", help="Let the recipe name your own module:attr.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, default=str))
