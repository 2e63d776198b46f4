"""`plan --measure`: run a few real steps and put what they cost in the place of the predictions."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...callbacks.accounting.budget import Budget
from ..planning.planner import Choice, Plan
from ..planning.predictions import costs, whole_run
from .fit import fit

if TYPE_CHECKING:
    from ...recipes import Recipe

STEPS = 8
UNTRACKED = {"ledger": False, "wandb": "off", "profile": None}


def measured(plan: Plan) -> Plan:
    """`plan` with seconds, FLOPs, dollars and memory of a step as measured over the first `STEPS` steps.

    Nothing of it is kept: no checkpoint, no ledger entry. Ranks other than the first end here.
    """
    quiet = without_traces(plan.recipe)
    with tempfile.TemporaryDirectory(prefix="shoestring-measure-") as home:
        report = fit(replace(plan, recipe=quiet, budget=Budget(steps=STEPS)), run_dir=home)
    if report is None:
        sys.exit(0)
    return replace(plan, predictions=_scaled(plan, report.summary), choices=(*plan.choices, _said()))


def without_traces(recipe: Recipe) -> Recipe:
    """The same recipe for a few steps that leave nothing: no ledger entry, no evaluation, no export."""
    return recipe.model_copy(
        update={
            "tracking": recipe.tracking.model_copy(update={**UNTRACKED, "log_every": 1}),
            "evaluation": recipe.evaluation.model_copy(update={"at_end": False, "every": None, "generate": None}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": None}),
            "export": None,
            "goal": None,
        }
    )


def _said() -> Choice:
    return Choice(
        "measured", f"{STEPS} steps", "a step's time, FLOPs and memory are measurements, the totals scaled up"
    )


def _scaled(plan: Plan, summary: Any) -> dict[str, Any]:
    step = {
        "steps": 1.0,
        "samples": summary["samples"] / STEPS,
        "tokens": summary["tokens"] / STEPS,
        "epochs": (summary["epochs"] or 0.0) / STEPS,
        "flops": summary["flops_realised"] / STEPS,
        **costs(summary["windows"]["train"] / STEPS, plan.world_size, plan.usd_per_device_hour, plan.watts_per_device),
    }
    return {
        **plan.predictions,
        **{f"{name}_per_step": step[name] for name in ("seconds", "flops", "usd", "kwh")},
        "peak_bytes": summary["peak_bytes"],
        **whole_run(plan.budget, step, _around(plan, summary)),
    }


def _around(plan: Plan, summary: Any) -> dict[str, float]:
    """The start, the last checkpoint and the final weights, as they were measured; an evaluation was not."""
    windows = summary["windows"]
    seconds = sum(windows.get(name, 0.0) for name in ("startup", "checkpoint", "other"))
    return costs(seconds, plan.world_size, plan.usd_per_device_hour, plan.watts_per_device)


__all__ = ["STEPS", "measured", "without_traces"]
