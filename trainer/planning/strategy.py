"""Which optimizer and which strategy: what goes together, and the least sharding that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from ...callbacks.contract import Technique
from ...own_code import CannotImport
from ...recipes import Recipe, RecipeError
from ...recipes.adapters import KINDS
from ...recipes.strategy_rules import settings_without_use
from ...strategies import ASKED_FOR, OFFLOADS, ON_CUDA
from ..tasks.optimizers.cards import OptimizerCard, UnknownOptimizer, optimizer_card
from .fitting import Fit, gib
from .needs import MOMENTS
from .sizes import Size
from .target import Target

ROOM = 0.6  # of a device, for what stays; the rest is for activations


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
    recipe: Recipe, target: Target, size: Size, optimizer: OptimizerCard, fit: Callable[[str, int], Fit],
    chosen: list[Choice],
) -> tuple[str, int]:  # fmt: skip
    """Strategy and devices per node: the least sharding that fits.

    Args:
        recipe: What was asked for.
        target: What is planned for.
        size: The model's counts.
        optimizer: Its card.
        fit: The memory under a strategy on so many devices a node, with the smallest micro-batch that may be chosen.
        chosen: The decisions are added here.
    """
    wanted, count = recipe.strategy.name, recipe.strategy.devices
    if count == "auto":
        count, why = _devices(wanted, target)
    else:
        why = "the recipe says so"
    chosen.append(Choice("devices", f"{count} x {recipe.strategy.nodes}", why))
    world = count * recipe.strategy.nodes
    possible = _possible(recipe, world, optimizer)
    if wanted != "auto":
        chosen.append(Choice("strategy", wanted, "the recipe says so"))
        return wanted, count
    if world == 1 or size.parameters is None:
        name, why = _without_size(possible, world)
    else:
        name, why = _least_sharding([fit(each, count) for each in possible if each != "single"])
    chosen.append(Choice("strategy", name, why))
    return name, count


def check_settings(recipe: Recipe, strategy: str, techniques: Sequence[Technique], world: int, on: str) -> None:
    """Refuse keys that do nothing under the strategy and the precision that were chosen, or not on so many ranks or
    this accelerator."""
    if recipe.strategy.quantized_weights and on != "cuda":
        raise RecipeError([recipe.problem("strategy.quantized_weights", True, "false on a CPU", f"it {ON_CUDA}")])
    if world % recipe.strategy.hpz:
        allowed = f"a number that divides all ranks: {world}"
        raise RecipeError([recipe.problem("strategy.hpz", recipe.strategy.hpz, allowed)])
    precision = next((t.dtype for t in techniques if t.card.name == "mixed_precision"), "fp32")  # type: ignore[attr-defined]
    if unused := list(settings_without_use(recipe, strategy, precision)):
        raise RecipeError(
            [recipe.problem(each.key, written(recipe, each.key), each.allowed, each.hint) for each in unused]
        )


def written(recipe: Recipe, key: str) -> object:
    """What stands at a dotted key of two words."""
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def _devices(wanted: str, target: Target) -> tuple[int, str]:
    if target.count:
        return (1 if wanted == "single" else target.count), "every GPU of the machine"
    alone = wanted in ("auto", "single")
    if target.accelerator == "cuda":
        return (1 if alone else 2), f"this machine has no {target.device.name}: strategy.devices says how many"
    return (1, "no GPU: one process uses all cores") if alone else (2, "no GPU: two processes show the sharding")


def _possible(recipe: Recipe, world: int, optimizer: OptimizerCard) -> list[str]:
    """What goes with the optimizer and the offload that were asked for; an error where nothing does."""
    wanted, offload, name = recipe.strategy.name, recipe.strategy.offload, recipe.optimizer.name
    able = [each for each, offloads in OFFLOADS.items() if offload in offloads]
    able = [each for each in able if each == wanted or each not in ASKED_FOR]
    able = [each for each in able if each == "single" or world > 1 or each != "ddp"]
    if recipe.optimizer.in_backward:
        able = [each for each in able if each in ("single", "ddp")]
    if recipe.model.adapter is not None and not KINDS[recipe.model.adapter.kind].sharded:
        able = [each for each in able if each != "zero3"]
    whole = [each for each in able if each in optimizer.strategies]
    if not whole or (wanted != "auto" and wanted in able and wanted not in whole):
        where = f"strategy.name {wanted}" if whole else f"strategy.offload {offload}"
        rule = f"an optimizer that works on flat shards, with {where}"
        hint = f"{name} needs whole weight matrices: use single or ddp without offload, or optimizer.name adamw"
        raise RecipeError([recipe.problem("optimizer.name", name, rule, hint)])
    return whole


def _without_size(possible: list[str], world: int) -> tuple[str, str]:
    if world == 1:
        return possible[0], "one device" if possible[0] == "single" else "the least that can offload"
    return next(name for name in possible if name != "single"), "the model's size is not known beforehand"


def _least_sharding(ways: list[Fit]) -> tuple[str, str]:
    """The first of these that fits and leaves room for activations; else the first that fits; else the last."""
    roomy = [way for way in ways if way.fits and _share(way) < ROOM]
    way = next(iter(roomy or [way for way in ways if way.fits]), ways[-1])
    there, needed = way.target.memory(way.inputs.devices), gib(way.memory.total)
    if there is None:
        return way.inputs.strategy, f"needs about {needed} a device, and what a device has is not known"
    why = f"the least sharding that fits: about {needed} of {gib(there)} a device"
    return way.inputs.strategy, why if way.fits else f"needs about {needed} of {gib(there)} a device"


def _share(way: Fit) -> float:
    """What stays all the time, as a share of a device."""
    kept = sum(term.bytes for term in way.memory.device if term.moments == MOMENTS)
    return kept / (way.target.memory(way.inputs.devices) or inf)
