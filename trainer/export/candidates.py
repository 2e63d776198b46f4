"""The ways to make a trained model smaller without training it: one line each. Add yours here.

A candidate is a form of export (see `write.py`) of the model as it is, or of a changed copy (`change`). Sparse storage
costs nothing where it does not pay, so every torch form has it. What runs it decides its latency: the torch forms are
read back to float32 and run eagerly, so they are smaller, not faster; fewer FLOPs come from low rank, fast int8
products from ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """name: as in the table. to, quantize: the export. change: a changed copy of the model; None: as it is."""

    name: str
    to: str = "torch"
    quantize: str | None = None
    change: Callable[[nn.Module], nn.Module] | None = None

    @property
    def backend(self) -> str:
        return "onnxruntime" if self.to == "onnx" else "eager"


def low_rank(energy: float) -> Callable[[nn.Module], nn.Module]:
    """Linear layers cut to the rank that keeps this share of their squared singular values."""
    from .low_rank import factorized

    return partial(factorized, energy=energy)


def all_candidates() -> tuple[Candidate, ...]:
    """Every candidate, in the order of the table."""
    plain = [Candidate(name="float32"), Candidate(name="float16", quantize="float16")]
    small = [Candidate(name=name, quantize=name) for name in ("int8", "int4")]
    thin = [
        Candidate(name=f"rank {energy:.0%} {quantize}", quantize=quantize, change=low_rank(energy))
        for energy in (0.99, 0.95, 0.9)
        for quantize in ("float16", "int8")
    ]
    fast = [Candidate(name="onnx", to="onnx"), Candidate(name="onnx int8", to="onnx", quantize="int8")]
    return (*plain, *small, *thin, *fast)
