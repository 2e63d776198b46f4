"""Whether a run fits into the memory of its devices and nodes, and the refusal where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

from ... import ShoestringError
from ...callbacks.contract import Effect, Technique, Workload
from ...recipes import Recipe
from ...strategies import Sharding
from ..tasks.optimizers.cards import OptimizerCard
from ..tasks.weight_dtypes import kept_in
from .activations import Checkpointing
from .memory import memory
from .needs import Inputs, Memory, Term
from .preferences import documents
from .sizes import Size
from .target import Target

_OTHERS_MEMORY = ("mixed_precision", "gradient_checkpointing")  # whose effect is a formula here, not a factor


class CannotFit(ShoestringError):
    """A run whose memory would be more than its devices or nodes have."""


@dataclass(frozen=True)
class Fit:
    """The memory of one way to run, beside what there is."""

    inputs: Inputs
    target: Target
    memory: Memory

    @property
    def fits(self) -> bool:
        """With what an allocator usually loses."""
        return self._within(self.memory.total)

    @property
    def possible(self) -> bool:
        """Without."""
        return self._within(self.memory.needed)

    def _within(self, bytes_: float) -> bool:
        device, host = self.target.memory(self.inputs.devices), self.target.host_memory
        fits_host = host is None or self.memory.host_total <= host
        return fits_host and (device is None or bytes_ <= device)


def fit_of(inputs: Inputs, target: Target) -> Fit:
    """The memory of these inputs."""
    return Fit(inputs, target, memory(inputs))


def inputs_of(
    recipe: Recipe, target: Target, size: Size, optimizer: OptimizerCard, techniques: Sequence[Technique]
) -> Callable[..., Inputs]:
    """Make a function of strategy, devices, nodes, micro and accumulate: all else that decides memory is the recipe's.

    Args:
        recipe: What was asked for.
        target: What is planned for.
        size: The model's counts.
        optimizer: The card of its optimizer.
        techniques: The recipe's, and those that follow from it.
    """
    by_name: dict[str, Any] = {t.card.name: t for t in techniques}
    others = [t for t in techniques if t.card.name not in _OTHERS_MEMORY]
    again, mixed = by_name.get("gradient_checkpointing"), by_name.get("mixed_precision")
    precision = mixed.dtype if mixed else "fp32"
    adapter = recipe.model.adapter
    chunked = recipe.model.chunked_loss if recipe.model.form == "causal-lm" and "distillation" not in by_name else False

    def made(strategy: str, devices: int, nodes: int, micro: int, accumulate: int) -> Inputs:
        effects = (t.predict(workload_of(recipe, size, devices * nodes)) for t in others)
        return Inputs(
            size=size, length=tokens_of_sample(recipe, size), micro=micro, accumulate=accumulate,
            devices=devices, nodes=nodes, strategy=strategy, offload=recipe.strategy.offload,
            nvme=recipe.strategy.nvme is not None,
            accelerator=target.accelerator, precision=precision, base=base_dtype(recipe, precision),
            optimizer=optimizer, checkpointing=Checkpointing(again.every, again.mode) if again else Checkpointing(),
            adapter_dtype=adapter.dtype if adapter else "compute", dropout=bool(adapter and adapter.dropout),
            chunked_loss=chunked, in_backward=recipe.optimizer.in_backward, sharding=sharding_of(recipe),
            effect=reduce(times, effects, Effect()), shared_extra="distillation" not in by_name,
        )  # fmt: skip

    return made


def tokens_of_sample(recipe: Recipe, size: Size) -> int:
    """Tokens of a sample, where work is counted in them; else 1."""
    return recipe.data.sequence_length * documents(recipe) if size.tokens else 1


def sharding_of(recipe: Recipe) -> Sharding:
    """How ZeRO communicates, as the recipe says."""
    return Sharding(**{field.name: getattr(recipe.strategy, field.name) for field in fields(Sharding)})


def base_dtype(recipe: Recipe, precision: str) -> str:
    """What frozen weights are kept in."""
    return kept_in(recipe.model, precision).name


def workload_of(recipe: Recipe, size: Size, world: int) -> Workload:
    """What techniques predict their effect on."""
    tokens = recipe.data.batch_size * tokens_of_sample(recipe, size)
    budget = recipe.budget
    steps = budget.steps or (budget.tokens or 0) / tokens or (budget.samples or 0) / max(1, recipe.data.batch_size)
    return Workload(
        parameters=size.parameters or 0, layers=size.layers, sequence_length=recipe.data.sequence_length,
        tokens_per_step=tokens, steps=int(steps or 1000), world_size=world,
    )  # fmt: skip


def times(a: Effect, b: Effect) -> Effect:
    """Both effects together."""
    return Effect(
        flops=a.flops * (b.flops if b.realised else 1.0),
        activations=a.activations * b.activations,
        states=a.states * b.states,
        communication=a.communication * b.communication,
        steps=a.steps * b.steps,
    )


def refusal(fit: Fit, place: str, alternatives: Sequence[object]) -> CannotFit:
    """What fills the memory, and what would fit; `place` says whose run it is."""
    need, there = fit.memory, fit.target.memory(fit.inputs.devices)
    name, ranks = fit.target.device.name, fit.inputs.devices
    if there is not None and need.needed > there:
        each = f"each of {ranks} processes has {gib(there)} of this node's" if fit.target.accelerator == "cpu" else (
            f"{name} has {gib(there)}"
        )  # fmt: skip
        terms = [*need.at(need.moment), Term("context", need.context)]
        text = (
            f"needs {gib(need.needed)} a device, and {each}. At its fullest moment, the {need.moment}: {listed(terms)}"
        )
    else:
        text = f"needs {gib(need.host_total)} of host memory a node, and there are {gib(fit.target.host_memory or 0)}: "
        text += listed(sorted(need.host, key=lambda term: -term.bytes))
    lines = [f"{place}: does not fit in memory: {text}."]
    lines += ["What would fit, the cheapest first:"] if alternatives else [
        "No change of micro-batch, checkpointing, sharding, offload, adapter, precision or devices would make it fit."
    ]  # fmt: skip
    lines += [f"  {each}" for each in alternatives]
    return CannotFit("\n".join(lines))


def listed(terms: Sequence[Term]) -> str:
    """Terms with their sizes."""
    return ", ".join(f"{term.name} {gib(term.bytes)}" for term in terms if term.bytes > 0)


def gib(value: float) -> str:
    """Bytes in binary units."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def with_micro(fit: Fit, micro: int, total: int) -> Fit:
    """The same with another micro-batch; `total` samples in a step."""
    accumulate = total // (micro * fit.inputs.world)
    return fit_of(replace(fit.inputs, micro=micro, accumulate=accumulate), fit.target)
