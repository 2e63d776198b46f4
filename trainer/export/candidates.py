"""The ways to make a trained model smaller without training it: one line each. Add yours here.

A candidate is a form of export (see `write.py`) of the model as it is, or of a changed copy (`change`). Sparse storage
costs nothing where it does not pay, so every torch form has it. What runs it decides its latency: the torch forms are
read back to float32 and run eagerly, so they are smaller, not faster; fewer FLOPs come from low rank, fast int8
products from ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from .trained import Trained

    Change = Callable[[Trained], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """name: as in the table. to, quantize: the export. change: a changed copy of a run's model; None: as it is."""

    name: str
    to: str = "torch"
    quantize: str | None = None
    change: Change | None = None

    @property
    def backend(self) -> str:
        return "onnxruntime" if self.to == "onnx" else "eager"


def low_rank(energy: float) -> Change:
    """Linear layers cut to the rank that keeps this share of their squared singular values."""

    def change(trained: Trained) -> nn.Module:
        from .low_rank import factorized

        return factorized(trained.model, energy)

    return change


def one_shot(method: str, sparsity: float) -> Change:
    """Linear layers pruned by what they do to training samples of the run (see `one_shot.py`)."""

    def change(trained: Trained) -> nn.Module:
        import copy

        from .one_shot import prune_one_shot
        from .runtimes import calibration

        model = copy.deepcopy(trained.model)
        prune_one_shot(model, calibration(trained), method, sparsity)
        return model

    return change


def all_candidates() -> tuple[Candidate, ...]:
    """Every candidate, in the order of the table."""
    plain = [Candidate(name="float32"), Candidate(name="float16", quantize="float16")]
    small = [Candidate(name=name, quantize=name) for name in ("int8", "int4")]
    thin = [
        Candidate(name=f"rank {energy:.0%} {quantize}", quantize=quantize, change=low_rank(energy))
        for energy in (0.99, 0.95, 0.9)
        for quantize in ("float16", "int8")
    ]
    pruned = [
        Candidate(name=f"{method} 50% int8", quantize="int8", change=one_shot(method, 0.5))
        for method in ("sparsegpt", "wanda")
    ]
    fast = [Candidate(name="onnx", to="onnx"), Candidate(name="onnx int8", to="onnx", quantize="int8")]
    return (*plain, *small, *thin, *pruned, *fast)
