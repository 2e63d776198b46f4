"""What a run is, as data: YAML in, a validated, frozen, content-hashed `Recipe` out. Nothing here imports torch."""

from ..problems import Problem
from .dump import dump_recipe
from .errors import RecipeError
from .json_schema import recipe_schema
from .load import load_recipe, recipe_from, shipped_recipes
from .recipe import Recipe
from .schema import BudgetSpec, Goal, TechniqueSpec

__all__ = [
    "BudgetSpec",
    "Goal",
    "Problem",
    "Recipe",
    "RecipeError",
    "TechniqueSpec",
    "dump_recipe",
    "load_recipe",
    "recipe_from",
    "recipe_schema",
    "shipped_recipes",
]
