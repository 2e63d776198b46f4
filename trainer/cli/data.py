"""The command about a recipe's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AllowCode, AsJson, Overrides, RecipePath, print_json


def data(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="The run that it is for; its cache is used.")
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Show what a recipe would learn from: samples with the tokens that are trained on, counts, lengths, duplicates."""
    from ...recipes import load_recipe
    from ..run.receipt import receipt_of

    receipt = receipt_of(load_recipe(recipe, overrides or (), allow_code), run_dir).as_dict()
    if as_json:
        print_json(receipt)
    else:
        from .display import console
        from .receipt_display import show_receipt

        show_receipt(receipt, console)
