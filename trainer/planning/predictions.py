"""What a plan should need, from formulas: memory, FLOPs, time, money. Estimates, never printed as measurements.

States and activations: ZeRO (arXiv 1910.02054 §3) and Korthikanti (2205.05198); FLOPs: PaLM (2204.02311 appendix B).
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

from ...callbacks.contract import Effect, Technique, Workload
from ...cluster import Hardware
from ...recipes import Recipe
from ..machine.facts import Machine, peak
from .sizes import Size

ASSUMED_MFU = {"cuda": 0.35, "cpu": 0.5}  # until the run has measured its own


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
    recipe: Recipe, machine: Machine, device: Hardware, size: Size, techniques: tuple[Technique, ...],
    world: int, strategy: str, micro: int, usd: float, watts: float | None, optimizer: float = 8.0,
) -> dict[str, Any]:  # fmt: skip
    tokens = recipe.data.batch_size * (recipe.data.sequence_length if size.tokens else 1)
    told: dict[str, Any] = {"parameters": size.parameters, "trainable": size.trainable}
    if size.parameters is None:
        return told
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
    reachable = peak(dtype, device.name)[0] * ASSUMED_MFU[machine.accelerator] * world
    seconds = flops / reachable
    told |= {
        "tokens_per_step": tokens if size.tokens else None,
        "flops_per_step": flops,
        "state_bytes": state_bytes(size, strategy, world, optimizer) * effect.states,
        "activation_bytes": micro * size.activation_bytes(recipe.data.sequence_length) * effect.activations,
        "seconds_per_step": seconds,
        "usd_per_step": seconds / 3600 * world * usd,
        "kwh_per_step": seconds / 3600 * world * (watts or 0) / 1000,
    }
    ends = {
        "steps": recipe.budget.steps,
        "tokens": recipe.budget.tokens and recipe.budget.tokens / tokens,
        "samples": recipe.budget.samples and recipe.budget.samples / recipe.data.batch_size,
        "hours": recipe.budget.hours and recipe.budget.hours * 3600 / seconds,
        "device_hours": recipe.budget.device_hours and recipe.budget.device_hours * 3600 / seconds / world,
        "usd": recipe.budget.usd and usd and recipe.budget.usd / told["usd_per_step"],
        "flops": recipe.budget.flops and recipe.budget.flops / flops,
        "kwh": recipe.budget.kwh and watts and recipe.budget.kwh / told["kwh_per_step"],
    }
    known = {name: end for name, end in ends.items() if end}
    if known:
        binding = min(known, key=lambda name: known[name])
        last = math.floor(known[binding])
        told |= {
            "steps": last, "binding": binding, "seconds": last * seconds,
            "usd": last * told["usd_per_step"], "kwh": last * told["kwh_per_step"],
        }  # fmt: skip
    return told


def _times(a: Effect, b: Effect) -> Effect:
    return Effect(
        flops=a.flops * (b.flops if b.realised else 1.0),
        activations=a.activations * b.activations,
        states=a.states * b.states,
        communication=a.communication * b.communication,
        steps=a.steps * b.steps,
    )
