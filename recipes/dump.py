"""A recipe back to YAML, every value spelled out; `load_recipe` of it gives an equal recipe."""

from __future__ import annotations

from ..yaml_writer import write_yaml
from .recipe import Recipe


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML text: defaults filled in, `extends` and overrides resolved, amounts in base units."""
    return write_yaml(recipe.model_dump())
