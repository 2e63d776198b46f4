"""What a plan should need, from formulas: memory, FLOPs, time, money. Estimates, never printed as measurements.

Memory: `memory.py`; FLOPs: PaLM (2204.02311 appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from ...callbacks.accounting.budget import Budget
from ...callbacks.accounting.forecast import first_exhausted
from ...callbacks.contract import Effect, Technique
from ...recipes import Recipe
from ..machine.expected_peak import expected_peak
from ..tasks.chunks import chunks_of
from .fitting import Fit, times, tokens_of_sample, workload_of
from .preferences import forwards_besides
from .target import Target

ASSUMED_MFU = {"cuda": 0.35, "cpu": 0.5}  # until the run has measured its own
# seconds from the command's first line to the first step with data that is prepared, and bytes a second to a disk
ASSUMED_STARTUP = {"single": 5.0, "ddp": 8.0, "zero1": 12.0, "zero2": 12.0, "zero3": 12.0, "fsdp2": 8.0}
ASSUMED_DISK = 5e8
STATES = ("weights", "frozen weights", "master weights", "optimizer states", "gradients", "techniques")


def predict(
    recipe: Recipe, budget: Budget, target: Target, techniques: Sequence[Technique], fit: Fit, usd: float,
    watts: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Memory, FLOPs, time, money and energy of a step and of the run, as far as they can be told.

    Args:
        recipe: What was asked for.
        budget: Its limits.
        target: What is planned for.
        techniques: All of them.
        fit: The memory of the run.
        usd: An hour of a device.
        watts: Of a device under load.
    """
    inputs, size = fit.inputs, fit.inputs.size
    tokens = recipe.data.batch_size * tokens_of_sample(recipe, size)
    predicted: dict[str, Any] = {"parameters": size.parameters, "trainable": size.trainable}
    if size.parameters is None:
        return predicted
    world = inputs.world
    workload = workload_of(recipe, size, world)
    effect = reduce(times, (t.predict(workload) for t in techniques), Effect())
    each = size.flops_per_token(recipe.data.sequence_length)
    if chunks_of(size.vocabulary * inputs.micro * inputs.length, inputs.chunked_loss) > 1:
        each += size.head_flops_per_token
    each += 2.0 * size.active * forwards_besides(recipe)
    flops = each * tokens * effect.flops
    dtype = inputs.precision if inputs.precision == "fp32" or target.bf16 else "fp32"  # what emulates it gains nothing
    reachable = expected_peak(dtype, target.device.name) * ASSUMED_MFU[target.accelerator] * world
    seconds = flops / reachable
    cost = costs(seconds, world, usd, watts)
    predicted |= {
        "tokens_per_step": tokens if size.tokens else None,
        "flops_per_step": flops,
        **_memory(fit),
        "seconds_per_step": seconds,
        "usd_per_step": cost["usd"],
        "kwh_per_step": cost["kwh"],
    }
    step = {"steps": 1.0, "tokens": tokens, "samples": recipe.data.batch_size, "flops": flops}
    trained = (4 + inputs.optimizer.state_bytes) * float(size.trainable or 0) / (world if inputs.stage else 1)
    written = trained + 4 * (2 * size.parameters - (size.trainable or 0))  # a checkpoint, and the weights alone
    around = ASSUMED_STARTUP[inputs.strategy] + written / ASSUMED_DISK
    if recipe.evaluation.at_end and recipe.evaluation.batches:
        around += recipe.evaluation.batches * inputs.micro * world / recipe.data.batch_size * seconds / 3  # forwards
    return predicted | whole_run(budget, step | cost, costs(around, world, usd, watts))


def _memory(fit: Fit) -> dict[str, Any]:
    """Every term in bytes, and at which moment of a step most are alive."""
    need, inputs = fit.memory, fit.inputs
    at = {term.name for term in need.at(need.moment)}
    terms: dict[str, float] = {}
    for term in need.device:
        if term.bytes:
            terms[term.name] = terms.get(term.name, 0.0) + term.bytes
    return {
        "memory_bytes": need.total,
        "memory_available_bytes": fit.target.memory(inputs.devices),
        "memory_moment": need.moment,
        "memory_terms": {**terms, "context": need.context, "fragmentation": need.fragmentation},
        "memory_at_moment": sorted(at),
        "host_bytes": need.host_total or None,
        "host_available_bytes": fit.target.host_memory,
        "host_terms": {term.name: term.bytes for term in need.host if term.bytes},
        "state_bytes": sum(term.bytes for term in need.device if term.name in STATES),
        "activation_bytes": sum(term.bytes for term in need.device if term.name in ("activations", "logits")),
    }


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
