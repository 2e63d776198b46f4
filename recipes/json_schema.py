"""The JSON schema of recipes, for editors: keys, what they mean and what may be written, as YAML has it."""

from __future__ import annotations

from typing import Any

from .recipe import Recipe

TITLE = "A recipe of Shoestring"


def recipe_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a recipe's file.

    It is that of `Recipe`, with what only files have: `extends`, and a name that may be left out.

    Example:
        >>> recipe_schema()["$defs"]["BudgetSpec"]["properties"]["hours"]["anyOf"][1]
        {'type': 'string'}
    """
    schema = Recipe.model_json_schema()
    names = {"type": "string"}
    schema["properties"]["extends"] = {
        "anyOf": [names, {"type": "array", "items": names}],
        "description": "recipes to start from: files, relative to this one, or names of shipped recipes",
    }
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)  # what a file extends may have it
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": TITLE}
