"""From a recipe to a plan: every choice made, with its reason, and what the run should need. Starts nothing.

A prediction is an estimate from formulas (states and activations: ZeRO, arXiv 1910.02054 §3; Korthikanti, 2205.05198;
FLOPs: PaLM, 2204.02311 appendix B), never printed as a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ... import ShoestringError
from ...callbacks.accounting.budget import Budget
from ...callbacks.compose import compose
from ...callbacks.contract import BadSetting, IncompatibleTechniques, Technique
from ...callbacks.registry import NotATechnique, UnknownTechnique, declare, ready
from ...cluster import Hardware
from ...cluster.config.hardware import hardware
from ...own_code import CannotImport, is_code
from ...recipes import Recipe, RecipeError
from ..machine.facts import Machine, run_facts
from ..machine.facts import facts as machine_facts
from ..tasks.errors import TaskError
from ..tasks.optimizer_cards import OptimizerCard
from ..tasks.paths import CARRIED, find_files, model_folder, one_format
from .predictions import predict, state_bytes
from .sizes import Size, size_of
from .strategy import Choice, choose_optimizer, choose_strategy, memory_of

USABLE_MEMORY = 0.85  # the rest is context, workspaces and fragmentation


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `fit` needs, decided.

    Attributes:
        recipe: What was asked for.
        budget: Its limits.
        declared: Its techniques in the order in which they act, as far as a plan needs them.
        accelerator: "cuda" or "cpu".
        strategy: single | ddp | zero1 | zero2 | zero3.
        offload: none | optimizer | parameters: what ZeRO keeps in host memory.
        devices: Per node.
        nodes: How many there are.
        micro_batch: Samples per rank and forward pass.
        accumulate: Micro-batches in an optimizer step.
        hardware: The device's name in the catalogue.
        usd_per_device_hour: What a device costs.
        watts_per_device: What a device draws under load; None where nobody knows.
        choices: Every decision with its reason.
        warnings: What the user should know before paying.
        predictions: Estimates of memory, time, money and energy; None where nothing can be said beforehand.

    Example:
        >>> from shoestring.recipes import load_recipe
        >>> plan(load_recipe("quickstart", ["strategy.devices=1"])).world_size
        1
    """

    recipe: Recipe
    budget: Budget
    declared: tuple[Technique, ...]
    accelerator: str
    strategy: str
    offload: str
    devices: int
    nodes: int
    micro_batch: int
    accumulate: int
    hardware: str
    usd_per_device_hour: float
    watts_per_device: float | None
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]
    predictions: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def techniques(self) -> tuple[Technique, ...]:
        """In the order in which they act, to train with: Lightning callbacks."""
        return tuple(ready(technique) for technique in self.declared)

    @property
    def precision(self) -> str:
        """What it computes in: fp32, bf16 or fp16."""
        return next((t.dtype for t in self.declared if t.card.name == "mixed_precision"), "fp32")  # type: ignore[attr-defined]

    @property
    def world_size(self) -> int:
        """Devices of all nodes."""
        return self.devices * self.nodes

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json` and the journal."""
        return {
            "recipe": self.recipe.name,
            "recipe_hash": self.recipe.hash,
            "choices": [{"what": c.what, "value": c.value, "why": c.why} for c in self.choices],
            "techniques": [repr(t) for t in self.declared],
            "warnings": list(self.warnings),
            "predictions": dict(self.predictions),
            "world_size": self.world_size,
        }


def plan(recipe: Recipe, machine: Machine | None = None) -> Plan:
    """Decide how to run a recipe on a machine. Starts nothing.

    Args:
        recipe: What to run.
        machine: Its facts; by default those of this one, on which the recipe's files must then be.

    Returns:
        The plan: every choice with its reason, and estimates of what the run needs.

    Raises:
        RecipeError: The recipe cannot be run there; names file and line.
        IncompatibleTechniques: Techniques conflict.

    Example:
        >>> from shoestring.recipes import load_recipe
        >>> print(plan(load_recipe("quickstart")).choices[0].what)
        hardware
    """
    if machine is None:
        _present(recipe)
    machine = machine or machine_facts()
    chosen: list[Choice] = []
    device = _device(recipe, machine, chosen)
    size = size_of(recipe)
    optimizer = choose_optimizer(recipe)
    strategy, devices = choose_strategy(recipe, machine, device, size, optimizer, chosen)
    world = devices * recipe.strategy.nodes
    micro, accumulate = _batch(recipe, device, machine, size, world, strategy, optimizer, chosen)
    budget = Budget(**recipe.budget.model_dump())
    _possible(recipe, budget, size)
    if budget.epochs is not None:
        chosen.append(Choice("epochs", f"{budget.epochs:g}", "their steps are known when the data is read: --measure"))
    usd, watts = _price(recipe, device, chosen)
    composition = compose(
        _techniques(recipe, machine, chosen),
        run_facts(strategy, machine.accelerator, recipe.strategy.offload, recipe.optimizer.name),
    )
    for reason in composition.reasons:
        chosen.append(Choice("order", reason.partition(":")[0], reason.partition(": ")[2]))
    return Plan(
        recipe=recipe,
        budget=budget,
        declared=composition.techniques,
        accelerator=machine.accelerator,
        strategy=strategy,
        offload=recipe.strategy.offload,
        devices=devices,
        nodes=recipe.strategy.nodes,
        micro_batch=micro,
        accumulate=accumulate,
        hardware=device.name,
        usd_per_device_hour=usd,
        watts_per_device=watts,
        choices=tuple(chosen),
        warnings=composition.warnings,
        predictions=predict(
            recipe,
            budget,
            machine,
            device,
            size,
            composition.techniques,
            world,
            strategy,
            micro,
            usd,
            watts,
            optimizer.state_bytes,
        ),
    )


def _present(recipe: Recipe) -> None:
    """Refuse a recipe whose data or model is to be on this machine and is not."""
    data, model, problems = recipe.data, recipe.model, []
    named = {"data.source": data.source, "data.validation": data.validation}
    for key, source in named.items():
        carried = (
            source in CARRIED or (isinstance(source, str) and is_code(source)) or data.format in ("builtin", "hub")
        )
        if not isinstance(source, str) or carried:
            continue
        try:
            files = find_files(source, None if data.format == "auto" else data.format, key=key)
            if files and data.format == "auto":
                one_format(files, source)
        except TaskError as error:
            problems.append(recipe.problem(key, source, "files on this machine", str(error)))
    for key, name in (("model.name", model.name), ("model.tokenizer", model.tokenizer)):
        try:
            if isinstance(name, str) and not name.startswith("runs/"):  # which another run is yet to leave there
                model_folder(name, key)
        except TaskError as error:
            problems.append(recipe.problem(key, name, "a folder on this machine, or a hub name", str(error)))
    if problems:
        raise RecipeError(problems)


# -- choices -------------------------------------------------------------------------------------------------------
def _device(recipe: Recipe, machine: Machine, chosen: list[Choice]) -> Hardware:
    name, why = recipe.cluster.hardware, "the recipe says so"
    if name == "auto":
        name, why = machine.hardware or machine.accelerator, "what this machine has"
    device = hardware(name)
    chosen.append(Choice("hardware", device.name, why))
    return device


def _batch(
    recipe: Recipe, device: Hardware, machine: Machine, size: Size, world: int, strategy: str,
    optimizer: OptimizerCard, chosen: list[Choice],
) -> tuple[int, int]:  # fmt: skip
    total, micro_setting = recipe.data.batch_size, recipe.data.micro_batch_size
    if total % world:
        raise RecipeError(
            [recipe.problem("data.batch_size", total, f"a multiple of the {world} ranks", "change it or the devices")]
        )
    if micro_setting == "auto":
        room = USABLE_MEMORY * memory_of(device, machine, world) - state_bytes(
            size, strategy, world, optimizer.state_bytes
        )
        each = size.activation_bytes(recipe.data.sequence_length)
        fits = [n for n in range(1, total // world + 1) if (total // world) % n == 0 and n * each <= max(room, 0)]
        micro, why = max(fits, default=1), "the largest that should fit in memory"
    else:
        micro, why = micro_setting, "the recipe says so"
    if total % (micro * world):
        text = f"a divisor of {total // world}, the samples of one rank a step"
        raise RecipeError([recipe.problem("data.micro_batch_size", micro, text)])
    accumulate = total // (micro * world)
    chosen.append(Choice("batch", f"{total} = {micro} x {world} ranks x {accumulate} accumulated", why))
    return micro, accumulate


def _price(recipe: Recipe, device: Hardware, chosen: list[Choice]) -> tuple[float, float | None]:
    usd, why = recipe.cluster.usd_per_device_hour, "the recipe says so"
    if usd is None:
        usd, why = device.usd_per_hour, f"{device.source}, {device.date}"
    if usd is None:
        if recipe.budget.usd is not None:
            rule = "a budget in dollars needs cluster.usd_per_device_hour"
            raise RecipeError([recipe.problem("budget.usd", recipe.budget.usd, rule, f"{device.name} has no price")])
        usd, why = 0.0, "no public price is known; set cluster.usd_per_device_hour"
    chosen.append(Choice("price", f"${usd:g} a device-hour", why))
    return usd, recipe.cluster.watts_per_device or device.watts


def _possible(recipe: Recipe, budget: Budget, size: Size) -> None:
    """Refuse a budget that ends before the first step."""
    per_step = {"samples": recipe.data.batch_size}
    if size.tokens:
        per_step["tokens"] = recipe.data.batch_size * recipe.data.sequence_length if recipe.data.pack else 0
    for name, need in per_step.items():
        limit = budget.given().get(name)
        if limit is not None and limit < need:
            rule = f"at least one optimizer step: {need} {name}"
            raise RecipeError([recipe.problem(f"budget.{name}", f"{limit:g}", rule)])


def _techniques(recipe: Recipe, machine: Machine, chosen: list[Choice]) -> list[Technique]:
    """The recipe's techniques, and those that its precision and schedule ask for."""
    made, problems = [], []
    for spec in recipe.techniques:
        try:
            made.append(declare(spec.name, spec.settings))
        except UnknownTechnique as error:
            key = f"techniques.{spec.name}" + (f".{error.found}" if error.of else "")
            problems.append(recipe.problem(key, error.found, " | ".join(error.legal), error.hint))
        except (CannotImport, NotATechnique) as error:
            problems.append(recipe.problem(f"techniques.{spec.name}", spec.name, f"a technique's class ({error})"))
        except BadSetting as error:
            key = f"techniques.{spec.name}.{error.setting}"
            problems.append(recipe.problem(key, error.found, error.allowed))
        except (ShoestringError, TypeError) as error:  # a duration that is none, a text where a number is compared
            problems.append(recipe.problem(f"techniques.{spec.name}", repr(dict(spec.settings)), str(error)))
    if problems:
        raise RecipeError(problems)
    present = {t.card.name for t in made}
    if "mixed_precision" not in present:
        dtype, why = recipe.precision, "the recipe says so"
        if dtype == "auto":
            dtype = "bf16" if machine.accelerators and machine.bf16 else "fp32"
            why = "the device computes in bf16" if dtype == "bf16" else "no accelerator with bf16"
            if recipe.model.dtype == "bf16":
                dtype, why = "bf16", "model.dtype says so"
        chosen.append(Choice("precision", dtype, why))
        if dtype != "fp32":
            made.append(declare("mixed_precision", {"dtype": dtype}))
    if "lr_schedule" not in present:
        optimizer = recipe.optimizer
        made.append(declare("lr_schedule", {"shape": optimizer.schedule, "warmup": optimizer.warmup}))
        chosen.append(
            Choice("schedule", f"{optimizer.schedule}, warmup {optimizer.warmup}", "ends when the budget ends")
        )
    return made


__all__ = ["Choice", "IncompatibleTechniques", "Plan", "plan", "state_bytes"]
