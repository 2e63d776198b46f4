"""The report of a finished run: `report.json` in its home."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files import replace_file
from .lines import finite

FILE = "report.json"


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
        left_out: Rows of the data that were not trained on, or not whole, by why.
        details: What the last evaluation has found beside metrics: of a classification, the table of classes and the
            confusion matrix.

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
    left_out: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps the run from being a success, a sentence each: see `verdict.problems`."""
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
            "left_out": dict(self.left_out),
            **({"details": dict(self.details)} if self.details else {}),
        }

    def save(self) -> None:
        """Keep it as `report.json` in the run's home."""
        replace_file(self.run_dir / FILE, json.dumps(finite(vars(self)), indent=1))


def finished_report(run_dir: Path, recipe: Any) -> Report | None:
    """The report of `run_dir` if this very recipe has already come to its end there, and its weights are intact."""
    try:
        kept = json.loads((run_dir / FILE).read_text())
        exported = Path(kept["exported"]) if kept["exported"] else None
        report = Report(**{**kept, "run_dir": run_dir, "exported": exported})
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or of a version that kept other things
        return None
    from ..checkpoint.weights import weights_problem

    if report.recipe_hash != recipe.hash or weights_problem(run_dir / "final"):
        return None
    return report
