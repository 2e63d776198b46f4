"""What a recipe asks of the model after each validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..monitor.further import EvaluationResult, FurtherEvaluation
from ..tasks.prompts import Prompts
from .deliverables import asked_as_chats

if TYPE_CHECKING:
    from ...recipes import Recipe
    from ..tasks.build import Task


@dataclass(frozen=True)
class Samples:
    """Completed prompts, as an evaluation."""

    prompts: Prompts

    def metrics(self) -> list[str]:
        return []

    def units(self) -> int:
        return len(self.prompts.prompts)

    def run(self, go_on: Callable[[], None]) -> EvaluationResult:
        return EvaluationResult(samples=self.prompts.texts(go_on))


def further_evaluations(recipe: Recipe, task: Task) -> list[FurtherEvaluation]:
    """What the section `evaluation` names besides validation."""
    wanted = recipe.evaluation
    if not wanted.prompts:
        return []
    chat = asked_as_chats(recipe, task)
    return [Samples(Prompts(task.module, task.tokenizer, wanted.prompts, chat, wanted.prompt_tokens))]
