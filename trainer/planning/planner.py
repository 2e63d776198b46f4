"""From a recipe to a plan: every choice made, with its reason, and what the run should need. Starts nothing.

A prediction is an estimate from formulas, never printed as a measurement. What cannot fit in memory is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ... import ShoestringError
from ...callbacks.accounting.budget import Budget
from ...callbacks.catalog.compose import compose
from ...callbacks.catalog.registry import NotATechnique, UnknownTechnique, declare, ready
from ...callbacks.contract import BadSetting, IncompatibleTechniques, Technique
from ...cluster import Hardware
from ...own_code import CannotImport, is_code
from ...recipes import Recipe, RecipeError
from ...strategies import Sharding
from ..machine.facts import Machine, run_facts
from ..machine.facts import facts as machine_facts
from ..tasks.optimizers.cards import OptimizerCard
from .alternatives import alternatives
from .checks import check_budget, check_present
from .drive import drive
from .fitting import Fit, fit_of, gib, inputs_of, refusal, sharding_of, with_micro
from .predictions import predict
from .sizes import size_of
from .strategy import Choice, check_settings, choose_optimizer, choose_strategy
from .target import Target, target_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `fit` needs, decided.

    Attributes:
        recipe: What was asked for.
        budget: Its limits.
        declared: Its techniques in the order in which they act, as far as a plan needs them.
        accelerator: "cuda" or "cpu".
        strategy: single | ddp | zero1 | zero2 | zero3 | fsdp2.
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
        fitted: What the memory holds, term by term.

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
    fitted: Fit | None = None

    @cached_property
    def techniques(self) -> tuple[Technique, ...]:
        """In the order in which they act, to train with: Lightning callbacks."""
        return tuple(ready(technique) for technique in self.declared)

    @property
    def precision(self) -> str:
        """What it computes in: fp32, bf16 or fp16."""
        return next((t.dtype for t in self.declared if t.card.name == "mixed_precision"), "fp32")  # type: ignore[attr-defined]

    @property
    def sharding(self) -> Sharding:
        """How ZeRO communicates, as the recipe says."""
        return sharding_of(self.recipe)

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
        CannotFit: It needs more memory than there is; names what fills it, and changes that fit.

    Example:
        >>> from shoestring.recipes import load_recipe
        >>> print(plan(load_recipe("quickstart")).choices[0].what)
        hardware
    """
    if machine is None:
        check_present(recipe)
    machine = machine or machine_facts()
    chosen: list[Choice] = []
    target, why = target_of(recipe, machine)
    chosen.append(Choice("hardware", target.device.name, why))
    size = size_of(recipe)
    sized = size.parameters is not None
    optimizer = choose_optimizer(recipe)
    said: list[Choice] = []
    techniques = _techniques(recipe, target, optimizer, said)
    make = inputs_of(recipe, target, size, optimizer, techniques)
    nodes, least = recipe.strategy.nodes, recipe.data.micro_batch_size
    least = 1 if least == "auto" else least

    def fit(strategy: str, devices: int) -> Fit:
        accumulate = max(1, recipe.data.batch_size // (least * devices * nodes))
        return fit_of(make(strategy, devices, nodes, least, accumulate), target)

    strategy, devices = choose_strategy(recipe, target, size, optimizer, fit, chosen)
    check_settings(recipe, strategy, techniques, devices * nodes, target.accelerator)
    fitted = _batch(recipe, fit(strategy, devices), sized, chosen)
    if target.accelerator == "cuda" or recipe.deterministic:
        chosen.append(_deterministic(recipe.deterministic, target))
    budget = Budget(**recipe.budget.model_dump())
    check_budget(recipe, budget, size)
    if budget.epochs is not None:
        chosen.append(Choice("epochs", f"{budget.epochs:g}", "their steps are known when the data is read: --measure"))
    usd, watts = _price(recipe, target.device, chosen)
    chosen += said
    composition = compose(
        techniques,
        run_facts(
            strategy, target.accelerator, recipe.strategy.offload, recipe.optimizer.name,
            bf16=target.bf16, fp16=target.fp16, in_backward=recipe.optimizer.in_backward,
            adapted=recipe.model.adapter is not None, quantized=recipe.model.dtype in ("nf4", "int8"),
            nvme=recipe.strategy.nvme is not None,
        ),
    )  # fmt: skip
    if recipe.strategy.nvme is not None:
        chosen.append(drive(recipe, optimizer, fitted))
    for reason in composition.reasons:
        chosen.append(Choice("order", reason.partition(":")[0], reason.partition(": ")[2]))
    if sized and not fitted.possible:
        ways = alternatives(recipe, fitted, optimizer, techniques, recipe.strategy.name == "auto")
        raise refusal(fitted, f"{recipe.where('model')}: {recipe.name}", ways)
    return Plan(
        recipe=recipe,
        budget=budget,
        declared=composition.techniques,
        accelerator="cuda" if target.accelerator == "cuda" and machine.accelerators else "cpu",
        strategy=strategy,
        offload=recipe.strategy.offload,
        devices=devices,
        nodes=nodes,
        micro_batch=fitted.inputs.micro,
        accumulate=fitted.inputs.accumulate,
        hardware=target.device.name,
        usd_per_device_hour=usd,
        watts_per_device=watts,
        choices=tuple(chosen),
        warnings=(*composition.warnings, *_warnings(recipe, fitted, sized)),
        predictions=predict(recipe, budget, target, composition.techniques, fitted, usd, watts),
        fitted=fitted,
    )


def _warnings(recipe: Recipe, fit: Fit, sized: bool) -> list[str]:
    """What about the memory and the hardware the user should know."""
    target, said = fit.target, []
    there = target.memory(fit.inputs.devices)
    if not sized and recipe.model.name is not None:
        said.append(
            f"whether {recipe.model.name} fits in memory is not known: its size is not on this machine. Give "
            "model.config, or download the model first."
        )
    elif sized and not fit.fits and there is not None:
        said.append(f"it may not fit in memory: it needs about {gib(fit.memory.total)} of {gib(there)} a device")
    if not target.here and target.accelerator == "cuda":
        said.append(f"this machine has no {target.device.name}; the plan is for one")
    if target.host_memory is None and sized:
        said.append(
            f"a node needs about {gib(fit.memory.host_total)} of host memory; what it has is not known: "
            "cluster.host_memory_gib"
        )
    return said


# -- choices -------------------------------------------------------------------------------------------------------
def _batch(recipe: Recipe, fit: Fit, sized: bool, chosen: list[Choice]) -> Fit:
    """The micro-batch, with the memory of a run that has it."""
    total, setting, world = recipe.data.batch_size, recipe.data.micro_batch_size, fit.inputs.world
    if total % world:
        raise RecipeError(
            [recipe.problem("data.batch_size", total, f"a multiple of the {world} ranks", "change it or the devices")]
        )
    own = total // world
    if recipe.optimizer.in_backward:
        micro, why = own, "optimizer.in_backward accumulates nothing"
        if setting not in ("auto", own):
            text = f"auto or {own} with optimizer.in_backward"
            hint = "gradients of several micro-batches would have to be kept"
            raise RecipeError([recipe.problem("data.micro_batch_size", setting, text, hint)])
    elif setting != "auto":
        micro, why = setting, "the recipe says so"
    elif not sized:
        # a module of the user's own mostly has loaders of its own, which make whole batches
        micro = own if is_code(recipe.model.task) else 1
        why = "the model's size is not known: data.micro_batch_size says how many fit"
    else:
        tried = sorted((n for n in range(1, own + 1) if own % n == 0), reverse=True)
        micro = next((n for n in tried if with_micro(fit, n, total).fits), 1)
        why = "the largest that should fit in memory" if with_micro(fit, micro, total).fits else "the smallest"
    if own % micro:
        text = f"a divisor of {own}, the samples of one rank a step"
        raise RecipeError([recipe.problem("data.micro_batch_size", micro, text)])
    chosen.append(Choice("batch", f"{total} = {micro} x {world} ranks x {own // micro} accumulated", why))
    return with_micro(fit, micro, total)


def _deterministic(wanted: bool, target: Target) -> Choice:
    """Whether a resumed run gives the bits of one that was never interrupted, and what that costs."""
    if target.accelerator != "cuda":
        why = "changes nothing on a CPU, which gives the same bits anyway"
    elif wanted:
        why = "resumes to the bit; the backward of attention and of embeddings is slower"
    else:
        why = "the fastest kernels; a resumed run may differ in the last bits, unless deterministic: true"
    return Choice("deterministic", "true" if wanted else "false", why)


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


def _techniques(recipe: Recipe, target: Target, card: OptimizerCard, chosen: list[Choice]) -> list[Technique]:
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
            dtype = "bf16" if target.accelerator == "cuda" and target.bf16 else "fp32"
            why = "the device computes in bf16" if dtype == "bf16" else "no accelerator with bf16"
            if recipe.model.dtype == "bf16":
                dtype, why = "bf16", "model.dtype says so"
        chosen.append(Choice("precision", dtype, why))
        if dtype != "fp32":
            made.append(declare("mixed_precision", {"dtype": dtype}))
    if "lr_schedule" not in present:
        optimizer = recipe.optimizer
        shape, why = optimizer.schedule, "ends when the budget ends"
        if card.averages and "schedule" not in optimizer.model_fields_set:
            shape, why = "constant", f"{optimizer.name} averages its path instead"
        made.append(declare("lr_schedule", {"shape": shape, "warmup": optimizer.warmup}))
        chosen.append(Choice("schedule", f"{shape}, warmup {optimizer.warmup}", why))
    return made


__all__ = ["Choice", "IncompatibleTechniques", "Plan", "plan"]
