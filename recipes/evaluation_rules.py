"""What must hold of evaluations besides validation."""

from __future__ import annotations

from collections.abc import Iterator

from ..own_code import is_code
from .recipe import Recipe
from .rule import Broken, depends_on


@depends_on("model.task", "evaluation")
def a_language_model_is_asked(recipe: Recipe) -> Iterator[Broken]:
    for key, nothing in (("generate", "null"), ("prompts", "[]")):
        if getattr(recipe.evaluation, key) and recipe.model.form != "causal-lm":
            hint = "only a causal-lm completes a prompt"
            yield Broken(f"evaluation.{key}", f"{nothing} for {recipe.model.task}", hint)


@depends_on("data.validation", "data.source", "evaluation")
def prompts_follow_validations(recipe: Recipe) -> Iterator[Broken]:
    evaluation = recipe.evaluation
    if not evaluation.prompts:
        return
    if recipe.data.validation == 0 and not is_code(recipe.data.source):
        hint = "they follow validations: hold out a fraction, like 0.05"
        yield Broken("evaluation.prompts", "[] where data.validation is 0", hint)
    elif evaluation.every is None and not evaluation.at_end:
        hint = 'they follow validations: every: "10%", or at_end: true'
        yield Broken("evaluation.prompts", "[] without evaluation.every and at_end", hint)
