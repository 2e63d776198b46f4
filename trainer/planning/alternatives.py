"""What would make a run fit: combinations of changes to its recipe, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from math import log2
from typing import Any, Generic, Protocol, TypeVar

from ...callbacks.catalog.compose import compose
from ...callbacks.catalog.registry import declare
from ...callbacks.contract import IncompatibleTechniques, Technique
from ...recipes import Recipe
from ...recipes.rules import TEXT_TASKS
from ...recipes.schema import AdapterSpec, ModelSpec
from ...strategies import ASKED_FOR, OFFLOADS
from ..tasks.optimizers.cards import OptimizerCard, optimizer_card
from ..tasks.weight_dtypes import kept_in
from .activations import Checkpointing
from .fitting import Fit, gib, with_micro
from .needs import Inputs
from .sizes import size_of
from .target import Target

SHOWN = 3
LESS = 0.1  # of the memory that was planned: what a plan that has run out of it must save
T = TypeVar("T")
# What a change costs, in no unit: time, money, or nearness to what was asked for. A micro-batch is free but for speed.
_COSTS = {
    "micro": 0.1, "strategy": 0.3, "checkpointing": 1.0, "precision": 1.0, "base": 1.0, "optimizer": 2.0,
    "parameters": 3.0, "adapter": 3.0, "devices": 2.0,
}  # fmt: skip


@dataclass(frozen=True)
class Alternative:
    """Overrides of the recipe with which it fits, and what it then needs."""

    overrides: tuple[str, ...]
    kinds: frozenset[str]
    cost: float
    fit: Fit

    def __str__(self) -> str:
        need = self.fit.memory
        host = f", {gib(need.host_total)} of host memory a node" if self.fit.inputs.offload != "none" else ""
        return f"{' '.join(map(_quoted, self.overrides))}   ({gib(need.total)} a device{host})"


class Planned(Protocol):
    """What is read of a plan."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def declared(self) -> tuple[Technique, ...]: ...

    @property
    def fitted(self) -> Fit | None: ...


@dataclass(frozen=True)
class _Change(Generic[T]):
    """One setting tried: what is written for it (nothing where it is the recipe's own), and what it costs."""

    value: T
    overrides: tuple[str, ...] = ()
    kind: str = ""
    cost: float = 0.0


def alternatives(
    recipe: Recipe, fit: Fit, optimizer: OptimizerCard, techniques: list[Technique], chosen: bool
) -> tuple[Alternative, ...]:
    """The cheapest changes with which the run fits, each of other kinds than those before it.

    Args:
        recipe: What was asked for.
        fit: What does not fit.
        optimizer: The recipe's.
        techniques: The recipe's, and those that follow from it.
        chosen: The strategy is the plan's own choice, so that another one is no change.
    """
    tried = _tried(recipe, fit, optimizer, techniques, chosen)
    ordered = sorted(tried, key=lambda each: (each.cost, each.fit.memory.total))
    kept: list[Alternative] = []
    for each in ordered:
        if not any(other.kinds <= each.kinds for other in kept):
            kept.append(each)
    return tuple(kept[:SHOWN])


def smaller(plan: Planned) -> tuple[Alternative, ...]:
    """The cheapest changes to a plan that has run out of memory: with them it needs less by `LESS` at least."""
    fit = plan.fitted
    if fit is None or fit.inputs.size.parameters is None:
        return ()
    limit = (1 - LESS) * fit.memory.total
    target = replace(fit.target, device_memory=limit) if fit.target.accelerator == "cuda" else replace(
        fit.target, host_memory=limit * fit.inputs.devices
    )  # fmt: skip
    recipe, techniques = plan.recipe, list(plan.declared)
    optimizer = optimizer_card(recipe.optimizer.name)
    return alternatives(recipe, replace(fit, target=target), optimizer, techniques, recipe.strategy.name == "auto")


def _tried(
    recipe: Recipe, fit: Fit, optimizer: OptimizerCard, techniques: list[Technique], chosen: bool
) -> Iterator[Alternative]:
    given, total = fit.inputs, recipe.data.batch_size
    starts = [_Change(given)]
    if recipe.model.adapter is None and recipe.model.form in TEXT_TASKS:
        adapted = replace(given, size=size_of(_with_adapter(recipe)))
        starts.append(_Change(adapted, ("model.adapter={kind: lora}",), "adapter", _COSTS["adapter"]))
    for start, precision, again, place in product(
        starts, _precisions(given, fit.target), _checkpointings(given, techniques), _places(given, fit.target)
    ):
        devices, nodes = place.value
        model = (_with_adapter(recipe) if start.kind else recipe).model
        made = replace(
            start.value, precision=precision.value, checkpointing=again.value, devices=devices, nodes=nodes,
            base=kept_in(model, precision.value).name,
        )  # fmt: skip
        if total % made.world:
            continue
        for way, base in product(_ways(made, given, optimizer, chosen), _bases(made)):
            strategy, offload = way.value
            each = replace(made, strategy=strategy, offload=offload, base=base.value)
            if (smaller := _micro(Fit(each, fit.target, fit.memory), total)) is None:
                continue
            micro, fitting = smaller
            changes: tuple[_Change[Any], ...] = (start, precision, again, place, way, base, micro)
            yield Alternative(
                tuple(text for change in changes for text in change.overrides),
                frozenset(change.kind for change in changes if change.kind),
                sum(change.cost for change in changes),
                fitting,
            )


def _micro(fit: Fit, total: int) -> tuple[_Change[int], Fit] | None:
    """The largest micro-batch, of at most the given one, with which these inputs fit."""
    given, own = fit.inputs.micro, total // fit.inputs.world
    least = own if fit.inputs.in_backward else 1  # which accumulates nothing
    for micro in sorted((n for n in range(least, min(given, own) + 1) if own % n == 0), reverse=True):
        tried = with_micro(fit, micro, total)
        if tried.fits:
            if micro == given:
                return _Change(micro), tried
            cost = _COSTS["micro"] * log2(given / micro)
            return _Change(micro, (f"data.micro_batch_size={micro}",), "micro", cost), tried
    return None


def _with_adapter(recipe: Recipe) -> Recipe:
    model = recipe.model.model_copy(update={"adapter": AdapterSpec.model_validate({"kind": "lora"})})
    return recipe.model_copy(update={"model": model})


def _precisions(given: Inputs, target: Target) -> list[_Change[str]]:
    changes = [_Change(given.precision)]
    if given.precision == "fp32" and target.bf16:
        changes.append(_Change("bf16", ("precision=bf16",), "precision", _COSTS["precision"]))
    return changes


def _checkpointings(given: Inputs, techniques: list[Technique]) -> list[_Change[Checkpointing]]:
    changes = [_Change(given.checkpointing)]
    if given.size.hidden and not any(t.card.name == "gradient_checkpointing" for t in techniques):
        with suppress(IncompatibleTechniques):
            facts = frozenset({given.accelerator, "bf16", "fp16"})
            compose([*techniques, declare("gradient_checkpointing", {})], facts)
            name, cost = ("techniques+=gradient_checkpointing",), _COSTS["checkpointing"]
            changes.append(_Change(Checkpointing(1), name, "checkpointing", cost))
    return changes


def _places(given: Inputs, target: Target) -> list[_Change[tuple[int, int]]]:
    """The devices asked for, and more of them where there may be more."""
    places = [_Change((given.devices, given.nodes))]
    if target.accelerator == "cpu":
        return places  # more processes share the same memory
    most = target.count or 8
    for devices, nodes in [(each, given.nodes) for each in (2, 4, 8) if each <= most] + [
        (max(most, given.devices), each) for each in (2, 4, 8, 16)
    ]:
        ratio = devices * nodes / given.world
        if ratio > 1 and devices >= given.devices:
            words = [f"strategy.devices={devices}"] if devices != given.devices else []
            words += [f"strategy.nodes={nodes}"] if nodes != given.nodes else []
            places.append(_Change((devices, nodes), tuple(words), "devices", _COSTS["devices"] * log2(ratio)))
    return places


def _ways(made: Inputs, given: Inputs, optimizer: OptimizerCard, chosen: bool) -> Iterator[_Change[tuple[str, str]]]:
    """Strategies with their offloads that go with so many devices and the optimizer."""
    for strategy, offload in ((name, each) for name, offloads in OFFLOADS.items() for each in offloads):
        zero = strategy.startswith("zero")
        if made.nvme and (strategy, offload) != (given.strategy, given.offload):
            continue
        if strategy in ASKED_FOR and strategy != given.strategy:
            continue
        if strategy == "single" if made.world > 1 else strategy == "ddp":
            continue
        alone = made.world == 1 and offload == "none" and strategy != given.strategy  # nothing to share, or to move
        # a key of the recipe that would be refused there
        idle = any(made.sharding.foreign_to(strategy)) or bool(made.world % made.sharding.hpz)
        if idle or (strategy not in ("single", "ddp") and (optimizer.whole_parameters or alone or given.in_backward)):
            continue
        words, kind, cost = [], "", 0.1 * int(strategy[-1]) if zero else 0.0
        if strategy != given.strategy or (chosen and made.world > 1):
            words = [f"strategy.name={strategy}"]
            kind, cost = ("", cost) if chosen else ("strategy", cost + _COSTS["strategy"])
        if offload != given.offload:
            words.append(f"strategy.offload={offload}")
            kind, cost = "offload", cost + _COSTS.get(offload, 0.0)
        yield _Change((strategy, offload), tuple(words), kind, cost)


def _bases(made: Inputs) -> list[_Change[str]]:
    """Frozen weights in fewer bytes, where a recipe can say so."""
    changes = [_Change(made.base)]
    if (made.size.trainable or 0) < (made.size.parameters or 0) and "dtype" in ModelSpec.model_fields:
        smaller = {"fp32": ("bf16", "nf4"), "bf16": ("nf4",)}.get(made.base, ())
        changes += [_Change(each, (f"model.dtype={each}",), "base", _COSTS["base"]) for each in smaller]
    return changes


def _quoted(override: str) -> str:
    return f"'{override}'" if " " in override else override
