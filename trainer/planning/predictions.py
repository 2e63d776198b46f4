"""What a plan should need, from formulas: memory, FLOPs, time, money. Estimates, never printed as measurements.

States and activations: ZeRO (arXiv 1910.02054 §3) and Korthikanti (2205.05198); FLOPs: PaLM (2204.02311 appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from ...callbacks.accounting.budget import Budget
from ...callbacks.accounting.forecast import first_exhausted
from ...callbacks.contract import Effect, Technique, Workload
from ...cluster import Hardware
from ...recipes import Recipe
from ..machine.expected_peak import expected_peak
from ..machine.facts import Machine
from .sizes import Size

ASSUMED_MFU = {"cuda": 0.35, "cpu": 0.5}  # until the run has measured its own
# seconds from the command's first line to the first step with data that is prepared, and bytes a second to a disk
ASSUMED_STARTUP = {"single": 5.0, "ddp": 8.0, "zero1": 12.0, "zero2": 12.0, "zero3": 12.0}
ASSUMED_DISK = 5e8


def state_bytes(size: Size, strategy: str, world: int, optimizer: float = 8.0) -> float:
    """Weights, gradients and optimizer states that a device holds, in bytes.

    Args:
        size: The model's.
        strategy: Which of them ranks share.
        world: Ranks.
        optimizer: Bytes it keeps of a trained parameter; beside 4 of the weight and 4 of the gradient.
    """
    train = float(size.trainable or 0)
    frozen = float((size.parameters or 0) - train)
    states = optimizer * train
    shared = {"zero1": (8 * train, states), "zero2": (4 * train, 4 * train + states)}
    whole, split = shared.get(strategy, (8 * train + states, 0.0))
    if strategy == "zero3":
        return (8 * train + states + 4 * frozen) / world
    return whole + split / world + 4 * frozen


def predict(
    recipe: Recipe, budget: Budget, machine: Machine, device: Hardware, size: Size, techniques: tuple[Technique, ...],
    world: int, strategy: str, micro: int, usd: float, watts: float | None, optimizer: float = 8.0,
) -> dict[str, Any]:  # fmt: skip
    tokens = recipe.data.batch_size * (recipe.data.sequence_length if size.tokens else 1)
    predicted: dict[str, Any] = {"parameters": size.parameters, "trainable": size.trainable}
    if size.parameters is None:
        return predicted
    steps = recipe.budget.steps or (recipe.budget.tokens or 0) / tokens or (recipe.budget.samples or 0) / max(
        1, recipe.data.batch_size
    )  # fmt: skip
    workload = Workload(
        parameters=size.parameters, layers=size.layers, sequence_length=recipe.data.sequence_length,
        tokens_per_step=tokens, steps=int(steps or 1000), world_size=world,
    )  # fmt: skip
    effect = reduce(_times, (t.predict(workload) for t in techniques), Effect())
    flops = size.flops_per_token(recipe.data.sequence_length) * tokens * effect.flops
    dtype = "bf16" if any(t.card.name == "mixed_precision" for t in techniques) else "fp32"
    reachable = expected_peak(dtype, device.name) * ASSUMED_MFU[machine.accelerator] * world
    seconds = flops / reachable
    cost = costs(seconds, world, usd, watts)
    predicted |= {
        "tokens_per_step": tokens if size.tokens else None,
        "flops_per_step": flops,
        "state_bytes": state_bytes(size, strategy, world, optimizer) * effect.states,
        "activation_bytes": micro * size.activation_bytes(recipe.data.sequence_length) * effect.activations,
        "seconds_per_step": seconds,
        "usd_per_step": cost["usd"],
        "kwh_per_step": cost["kwh"],
    }
    step = {"steps": 1.0, "tokens": tokens, "samples": recipe.data.batch_size, "flops": flops}
    written = state_bytes(size, strategy, world, optimizer) + 4 * size.parameters  # a checkpoint, and the weights alone
    around = ASSUMED_STARTUP[strategy] + written / ASSUMED_DISK
    if recipe.evaluation.at_end and recipe.evaluation.batches:
        around += recipe.evaluation.batches * micro * world / recipe.data.batch_size * seconds / 3  # forwards alone
    return predicted | whole_run(budget, step | cost, costs(around, world, usd, watts))


def costs(seconds: float, world: int, usd: float, watts: float | None) -> dict[str, float]:
    """What so many seconds of all devices cost, in the clock's units."""
    hours = seconds / 3600 * world
    return {"seconds": seconds, "device_hours": hours, "usd": hours * usd, "kwh": hours * (watts or 0) / 1000}


def whole_run(budget: Budget, step: Mapping[str, float], around: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The last step within a budget, what ends it there, and the whole run's seconds, dollars and kWh.

    Args:
        budget: Its limits.
        step: What every step costs, in the clock's units.
        around: What all besides steps costs: the start, the last evaluation, what is written at the end.

    Returns:
        Nothing where no limit is reached by such steps.
    """
    around = around or {}
    limits = {name: limit - around.get(name, 0.0) for name, limit in budget.limits().items()}
    end = first_exhausted(limits, step)
    if end is None:
        return {}
    last = max(0, end.last)
    binding = "hours" if end.binding == "seconds" else end.binding  # as the recipe spells it
    totals = {name: around.get(name, 0.0) + last * step[name] for name in ("seconds", "usd", "kwh")}
    return {"steps": last, "binding": binding, "seconds_besides_steps": around.get("seconds", 0.0)} | totals


def _times(a: Effect, b: Effect) -> Effect:
    return Effect(
        flops=a.flops * (b.flops if b.realised else 1.0),
        activations=a.activations * b.activations,
        states=a.states * b.states,
        communication=a.communication * b.communication,
        steps=a.steps * b.steps,
    )
