"""Which optimizer and which strategy: what goes together, and the least sharding whose model states fit."""

from __future__ import annotations

from dataclasses import dataclass

from ...cgroups import usable_memory
from ...cluster import Hardware
from ...own_code import CannotImport
from ...recipes import Recipe, RecipeError
from ...strategies import OFFLOADS
from ..machine.facts import Machine
from ..tasks.optimizer_cards import OptimizerCard, UnknownOptimizer, optimizer_card
from .predictions import state_bytes
from .sizes import Size


@dataclass(frozen=True)
class Choice:
    """One decision of the plan and why it was taken."""

    what: str
    value: str
    why: str


def choose_optimizer(recipe: Recipe) -> OptimizerCard:
    """The card of the recipe's optimizer; `RecipeError` where there is none of that name."""
    name = recipe.optimizer.name
    try:
        return optimizer_card(name)
    except UnknownOptimizer as error:
        raise RecipeError([recipe.problem("optimizer.name", name, error.allowed, error.hint)]) from None
    except CannotImport as error:
        raise RecipeError([recipe.problem("optimizer.name", name, f"an optimizer's class ({error})")]) from None


def choose_strategy(
    recipe: Recipe, machine: Machine, device: Hardware, size: Size, optimizer: OptimizerCard, chosen: list[Choice]
) -> tuple[str, int]:
    """Strategy and devices per node: the least sharding whose model states fit."""
    wanted, count = recipe.strategy.name, recipe.strategy.devices
    if count == "auto":
        if machine.accelerators:
            count, why = (1 if wanted == "single" else len(machine.accelerators)), "every GPU of the machine"
        elif wanted in ("auto", "single"):
            count, why = 1, "no GPU: one process uses all cores"
        else:
            count, why = 2, "no GPU: two processes show the sharding"
    else:
        why = "the recipe says so"
    chosen.append(Choice("devices", f"{count} x {recipe.strategy.nodes}", why))
    world = count * recipe.strategy.nodes
    possible = _possible(recipe, world, optimizer)
    if wanted != "auto":
        chosen.append(Choice("strategy", wanted, "the recipe says so"))
        return wanted, count
    name, why = _least_sharding(size, world, memory_of(device, machine, count), optimizer, possible)
    chosen.append(Choice("strategy", name, why))
    return name, count


def _possible(recipe: Recipe, world: int, optimizer: OptimizerCard) -> list[str]:
    """What goes with the optimizer and the offload that were asked for; an error where nothing does."""
    wanted, offload, name = recipe.strategy.name, recipe.strategy.offload, recipe.optimizer.name
    able = [each for each, offloads in OFFLOADS.items() if offload in offloads]
    able = [each for each in able if each == "single" or world > 1 or each.startswith("zero")]
    whole = [each for each in able if each in optimizer.strategies]
    if not whole or (wanted != "auto" and wanted in able and wanted not in whole):
        where = f"strategy.name {wanted}" if whole else f"strategy.offload {offload}"
        rule = f"an optimizer that works on flat shards, with {where}"
        hint = f"{name} needs whole weight matrices: use single or ddp without offload, or optimizer.name adamw"
        raise RecipeError([recipe.problem("optimizer.name", name, rule, hint)])
    return whole


def _least_sharding(
    size: Size, world: int, memory: float, optimizer: OptimizerCard, possible: list[str]
) -> tuple[str, str]:
    if world == 1:
        return possible[0], "one device" if possible[0] == "single" else "the least that can offload"
    if size.parameters is None:
        least = next(name for name in possible if name != "single")
        return least, "the model's size is not known beforehand"
    need = 0.0
    for name in (each for each in possible if each not in ("single", "zero3")):
        need = state_bytes(size, name, world, optimizer.state_bytes)
        if need < 0.6 * memory or "zero3" not in possible:  # the rest is for activations
            return name, f"model states need {need / 2**30:.2f} GiB of {memory / 2**30:.1f} GiB a device"
    return "zero3", f"model states need {need / 2**30:.1f} GiB a device under zero2"


def memory_of(device: Hardware, machine: Machine, processes: int) -> float:
    """Bytes of a device: what the catalogue says, or a process's share of this machine's."""
    if device.memory_bytes:
        return float(device.memory_bytes)
    return usable_memory() / max(1, processes)
