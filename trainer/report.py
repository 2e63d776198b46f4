"""What a finished run leaves besides its own files: what its recipe asked of it, and a report of all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replace_file
from .ledger.lines import finite

if TYPE_CHECKING:
    from ..recipes import Recipe
    from .tasks.build import Task

NEW_TOKENS = 64  # of a completed prompt


@dataclass(frozen=True)
class Report:
    """A finished run: its totals, whether its goal was reached, and what it left behind.

    Attributes:
        run_dir: The run's home.
        summary: Its totals and final metrics, as `Trainer.summary`.
        baselines: What must be beaten before a loss means anything, by name.
        goal_reached: None where the recipe has no goal.
        sample: The completion of the recipe's prompt, if it has one.
        exported: The folder of the exported model, if there is one.
        recipe_hash: Of the recipe that was run.

    Example:
        >>> Report(run_dir=Path("runs/mine"), summary={"steps": 3}).as_dict()["steps"]
        3
    """

    run_dir: Path
    summary: Mapping[str, Any]
    baselines: Mapping[str, float] = field(default_factory=dict)
    goal_reached: bool | None = None
    sample: str | None = None
    exported: Path | None = None
    recipe_hash: str = ""

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps the run from being a success, a sentence each: see `monitor.verdict.problems`."""
        return tuple(self.summary.get("problems", ()))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            **self.summary,
            "run_dir": str(self.run_dir),
            "baselines": dict(self.baselines),
            "goal_reached": self.goal_reached,
            "sample": self.sample,
            "exported": str(self.exported) if self.exported else None,
            "recipe_hash": self.recipe_hash,
        }


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
        from .export.trained import rebuilt

        recipe, trained = self.recipe, rebuilt(self.recipe, self.run_dir, task=self.task).task
        if prompt := recipe.evaluation.generate:
            from .tasks.generate import complete

            self.sample = complete(
                trained.module, trained.tokenizer, prompt, max_new_tokens=NEW_TOKENS, temperature=0.7, seed=recipe.seed
            )  # type: ignore[arg-type]
        if recipe.export:
            from .export.hf import save

            self.exported = Path(recipe.export.path or self.run_dir / "model")
            save(getattr(trained.module, "model", None), trained.tokenizer, self.exported)


def write_report(recipe: Recipe, run_dir: Path, summary: Mapping[str, Any], delivered: Deliverables) -> Report:
    """Put together what a run has reached, and keep it as `report.json`."""
    report = Report(
        run_dir=run_dir,
        summary=summary,
        baselines=delivered.task.facts.get("baselines", {}),
        goal_reached=summary.get("goal_reached"),
        sample=delivered.sample,
        exported=delivered.exported,
        recipe_hash=recipe.hash,
    )
    replace_file(run_dir / "report.json", json.dumps(finite(vars(report)), indent=1))
    return report


def finished_report(run_dir: Path, recipe: Any) -> Report | None:
    """The report of `run_dir` if this very recipe has already come to its end there, and its weights are intact."""
    try:
        kept = json.loads((run_dir / "report.json").read_text())
        exported = Path(kept["exported"]) if kept["exported"] else None
        report = Report(**{**kept, "run_dir": run_dir, "exported": exported})
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or of a version that kept other things
        return None
    from .checkpoint.final_weights import final_problem

    if report.recipe_hash != recipe.hash or final_problem(run_dir / "final.safetensors"):
        return None
    return report
