"""What learning from preferences takes beside a forward and a backward pass of one document a sample. No torch."""

from __future__ import annotations

from ...recipes import Recipe


def documents(recipe: Recipe) -> int:
    """Documents of a sample that are trained on: both answers of a pair."""
    task, section = recipe.model.task, recipe.model.preferences
    return 2 if task == "reward-model" or (task == "preference" and section.kind.pairs) else 1


def forwards_besides(recipe: Recipe) -> int:
    """Forward passes over as many tokens as are trained on: of a base without adapter, of KTO's mismatched answers."""
    if recipe.model.task != "preference":
        return 0
    kind = recipe.model.preferences.kind
    of_reference = 1 if kind.reference and recipe.model.adapter is not None else 0
    return of_reference if kind.pairs else 1 + 2 * of_reference
