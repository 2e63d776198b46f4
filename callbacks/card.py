"""What a technique says of itself before anything runs: card, changed settings, predictions and errors.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .. import IncompatibleTechniques as IncompatibleTechniques
from .. import ShoestringError

Part = Literal[
    "samples",  # which samples a step is made of, and in which order they come
    "batch_size",  # how many of them a step has
    "batch",  # what is in a batch: lengths, mixtures, values
    "tokens",  # which tokens of a sample a block computes with
    "depth",  # which blocks compute at all
    "modules",  # the layers of the model and their shapes
    "numerics",  # in what precision it computes, and the weights that layers see
    "activations",  # what a forward keeps for backward, and where
    "loss",
    "gradients",
    "communication",  # gradients on their way between ranks
    "weights",
    "optimizer",  # its state
    "lr",  # its hyper-parameters: learning rate, betas, eps
    "sharding",  # which rank holds what
]
Saving = Literal["steps", "flops", "time", "memory", "communication", "data", "size"]

PARTS: frozenset[str] = frozenset(Part.__args__)  # type: ignore[attr-defined]
SAVINGS: frozenset[str] = frozenset(Saving.__args__)  # type: ignore[attr-defined]
MIXING = frozenset({"muon", "soap", "galore"})  # optimizers whose step mixes a matrix's elements: zeros would not stay


class Misconfigured(ShoestringError):
    """A technique's setting is outside its legal range."""


class BadSetting(Misconfigured):
    """One setting of one technique: what was found and what is allowed."""

    def __init__(self, technique: str, setting: str, found: object, allowed: str) -> None:
        self.technique, self.setting, self.found, self.allowed = technique, setting, found, allowed
        super().__init__(f"{technique}: {setting}={found!r} is not allowed; use {allowed}")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The claims of a technique: printed in the docs, checked by the tests, written to the ledger as a claim.

    Args:
        name: The name in recipes, in snake_case.
        does: One line, without a full stop.
        paper: arXiv id.
        saves: What it saves, of `SAVINGS`.
        keeps: "bits", the same weights bit for bit; "result", the same up to rounding; "quality", a different path to
            the same goal.
        reads: Parts of the run it reads, of `PARTS`.
        writes: Parts of the run it changes, of `PARTS`.
        needs: Facts of the run it cannot do without, such as "cuda", "bf16", "zero-3".
        refuses: Facts of the run it does not work with, such as "muon".

    Raises:
        Misconfigured: A part or a saving is not among the known ones.

    Example:
        >>> sorted(Card(name="rigl", does="trains sparse", saves={"size"}, writes={"weights", "gradients"}).writes)
        ['gradients', 'weights']
    """

    name: str
    does: str
    paper: str = ""  # arXiv id
    saves: Set[Saving] = frozenset()
    keeps: Literal["bits", "result", "quality"] = "quality"
    reads: Set[Part] = frozenset()
    writes: Set[Part] = frozenset()
    needs: Set[str] = frozenset()
    refuses: Set[str] = frozenset()

    def __post_init__(self) -> None:
        for label in ("saves", "reads", "writes", "needs", "refuses"):
            object.__setattr__(self, label, frozenset(getattr(self, label)))
        for label, legal in (("reads", PARTS), ("writes", PARTS), ("saves", SAVINGS)):
            if stray := getattr(self, label) - legal:
                raise Misconfigured(f"card {self.name!r}: {label} {sorted(stray)} is not among {sorted(legal)}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that must be known before a `pl.Trainer` exists. Techniques return changed copies (`replace`).

    Args:
        precision: As `pl.Trainer` takes it.
        accumulate_grad_batches: Micro-batches in an optimizer step.
        strategy_options: Keyword arguments for the strategy's constructor.

    Example:
        >>> Settings().replace(precision="bf16-mixed").precision
        'bf16-mixed'
    """

    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    strategy_options: Mapping[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Settings:
        """A copy with these changes."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The run a technique predicts its effect on.

    Args:
        parameters: How many the model has.
        layers: How many repeated blocks it has.
        sequence_length: Tokens of a sample.
        tokens_per_step: Tokens of an optimizer step, per device.
        steps: Optimizer steps of the run.
        world_size: How many devices there are.

    Example:
        >>> Workload(parameters=10**9, layers=24, sequence_length=1024, tokens_per_step=2**16, steps=10_000).world_size
        1
    """

    parameters: int
    layers: int
    sequence_length: int
    tokens_per_step: float
    steps: int
    world_size: int = 1


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Factors a technique puts on a workload; 1 means untouched.

    Args:
        flops: Of the matrix products of a step.
        activations: Of the bytes kept for the backward pass.
        states: Of the bytes of weights, gradients and optimizer states.
        communication: Of the bytes each rank sends.
        steps: Of the number of steps to the same goal.
        realised: False where the saving exists only in counted FLOPs (a masked dense weight runs at full cost).

    Example:
        >>> Effect(flops=0.1, realised=False).activations
        1.0
    """

    flops: float = 1.0
    activations: float = 1.0
    states: float = 1.0
    communication: float = 1.0
    steps: float = 1.0
    realised: bool = True
