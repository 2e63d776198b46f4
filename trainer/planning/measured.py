"""`plan --measure`: run a few real steps and put what they cost in the place of the predictions."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace
from typing import Any

from ...callbacks.accounting.budget import Budget
from ..run import fit
from .planner import Choice, Plan

STEPS = 8


def measured(plan: Plan) -> Plan:
    """`plan` with seconds, FLOPs, dollars and memory of a step as measured over the first `STEPS` steps.

    Nothing of it is kept: no checkpoint, no ledger entry. Ranks other than the first end here.
    """
    recipe = plan.recipe
    quiet = recipe.model_copy(
        update={
            "tracking": recipe.tracking.model_copy(update={"ledger": False, "wandb": "off", "log_every": 1}),
            "evaluation": recipe.evaluation.model_copy(update={"at_end": False, "every": None, "generate": None}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": None}),
            "export": None,
            "goal": None,
        }
    )
    with tempfile.TemporaryDirectory(prefix="shoestring-measure-") as home:
        report = fit(replace(plan, recipe=quiet, budget=Budget(steps=STEPS)), run_dir=home)
    if report is None:
        sys.exit(0)
    return replace(plan, predictions=_scaled(plan, report.summary), choices=(*plan.choices, _said()))


def _said() -> Choice:
    return Choice(
        "measured", f"{STEPS} steps", "a step's time, FLOPs and memory are measurements, the totals scaled up"
    )


def _scaled(plan: Plan, summary: Any) -> dict[str, Any]:
    told = dict(plan.predictions)
    each = {
        "seconds": summary["windows"]["train"] / STEPS,
        "samples": summary["samples"] / STEPS,
        "tokens": summary["tokens"] / STEPS,
        "flops": summary["flops_realised"] / STEPS,
    }
    hours = each["seconds"] * plan.world_size / 3600
    each |= {"usd": hours * plan.usd_per_device_hour, "device_hours": hours, "steps": 1.0}
    each["kwh"] = hours * (plan.watts_per_device or 0) / 1000
    told |= {
        "seconds_per_step": each["seconds"],
        "flops_per_step": each["flops"],
        "usd_per_step": each["usd"],
        "kwh_per_step": each["kwh"],
        "peak_bytes": summary["peak_bytes"],
    }
    ends = {name: limit / each[name] for name, limit in plan.budget.limits().items() if each.get(name)}
    if ends:
        binding = min(ends, key=lambda name: ends[name])
        last = math.floor(ends[binding])
        told |= {"steps": last, "binding": binding} | {k: last * each[k] for k in ("seconds", "usd", "kwh")}
    return told


__all__ = ["STEPS", "measured"]
