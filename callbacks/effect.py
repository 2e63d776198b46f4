"""The effect that a technique predicts: factors on the work of a run. Imports neither torch nor Lightning."""

from __future__ import annotations

from dataclasses import dataclass


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
