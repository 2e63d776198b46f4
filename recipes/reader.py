"""A recipe's text as a tree, and what is wrong with it as a `RecipeError`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..problems import Malformed, Problem
from ..yaml_reader import YamlNode, read_text, read_yaml
from .errors import RecipeError

LEAST = "a mapping with at least model, data and budget"


def read_tree(text: str, place: Callable[[int], str], key: str = "") -> tuple[YamlNode, list[Problem]]:
    """`read_yaml` of a recipe, or of a value in an override.

    Raises:
        RecipeError: No tree can be had.
    """
    try:
        return read_yaml(text, place, key=key, what="recipe", least=LEAST)
    except Malformed as error:
        raise RecipeError(error.problems) from None


def read_recipe_text(path: Path) -> str:
    """The text of the file `path`.

    Raises:
        RecipeError: It cannot be read, is too large, or is no text.
    """
    try:
        return read_text(path)
    except Malformed as error:
        raise RecipeError(error.problems) from None
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"{error.strerror or error}", "a readable file")]) from None
