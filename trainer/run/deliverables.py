"""What a recipe asks of its finished run besides its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...recipes import Recipe
    from ..tasks.build import Task

NEW_TOKENS = 64  # of a completed prompt


@dataclass
class Deliverables:
    """What a recipe asks of its finished run: a completed prompt, an exported model."""

    recipe: Recipe
    run_dir: Path
    task: Task
    sample: str | None = None
    exported: Path | None = None

    @property
    def wanted(self) -> bool:
        return bool(self.recipe.evaluation.generate or self.recipe.export)

    def seconds(self, step: float) -> float:
        """About how long `make` takes, by the seconds of a step: a model is built, and asked once for each token."""
        rows = 3 * self.recipe.data.batch_size  # a backward pass takes two forward passes
        return self.task.model_seconds + (NEW_TOKENS * step / rows if self.recipe.evaluation.generate else 0.0)

    def make(self) -> None:
        from ..export.trained import rebuilt

        recipe, trained = self.recipe, rebuilt(self.recipe, self.run_dir, task=self.task).task
        if prompt := recipe.evaluation.generate:
            from ..tasks.generate import complete

            self.sample = complete(
                trained.module, trained.tokenizer, prompt, max_new_tokens=NEW_TOKENS, temperature=0.7, seed=recipe.seed
            )  # type: ignore[arg-type]
        if recipe.export:
            from ..export.hf import save

            self.exported = Path(recipe.export.path or self.run_dir / "model")
            save(getattr(trained.module, "model", None), trained.tokenizer, self.exported)
