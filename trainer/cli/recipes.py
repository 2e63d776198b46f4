"""The commands about recipes: list, show, schema and validate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AllowCode, AsJson, Overrides, RecipePath, print_json


def list_recipes(as_json: AsJson = False) -> None:
    """The recipes that come with Shoestring."""
    from ...recipes import shipped_recipes

    about = {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in shipped_recipes().items()}
    if as_json:
        print_json(about)
    else:
        for name, line in about.items():
            typer.echo(f"{name:25} {line}")


def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_written: Annotated[
        bool, typer.Option("--as-written", help="The file itself, with its comments, to start your own from.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """A recipe in full: every default filled in."""
    from ...problems import Problem
    from ...recipes import RecipeError, dump_recipe, load_recipe, shipped_recipes

    loaded = load_recipe(recipe, overrides or (), allow_code)
    if not as_written:
        typer.echo(dump_recipe(loaded).rstrip())
        return
    if overrides:
        raise RecipeError([Problem("--as-written", "", overrides[0], "no changes: a file is shown as it is")])
    shipped = shipped_recipes()
    typer.echo((shipped[recipe] if recipe in shipped else Path(recipe)).read_text().rstrip())


def schema() -> None:
    """The JSON schema of recipes, with which editors complete and check them.

    Write it beside your recipes, and begin these with: # yaml-language-server: $schema=recipe.schema.json
    """
    from ...recipes import recipe_schema

    print_json(recipe_schema())


def validate(recipe: RecipePath, overrides: Overrides = None, allow_code: AllowCode = False) -> None:
    """Check a recipe; every mistake is listed with its file and line."""
    from ...recipes import load_recipe

    loaded = load_recipe(recipe, overrides or (), allow_code)
    typer.echo(f"{loaded.name} is valid ({loaded.hash})")
