"""The ways to make a trained model smaller without training it: one line each. Add yours here.

A candidate is a form of export (see `write.py`) of the model as it is, or of a changed copy (`change`). Sparse storage
costs nothing where it does not pay, so every torch form has it. What runs it decides its latency: the torch forms are
read back to float32 and run eagerly, so they are smaller, not faster; fewer FLOPs come from low rank, fast int8
products from ONNX Runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .trained import CannotExport

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """name: as in the table. to, quantize: the export. change: a changed copy of the model; None: as it is.

    Candidates with one and the same `change` share the copy, and the trace of it for ONNX.
    """

    name: str
    to: str = "torch"
    quantize: str | None = None
    change: Callable[[nn.Module], nn.Module] | None = None

    @property
    def backend(self) -> str:
        return "onnxruntime" if self.to == "onnx" else "eager"


def all_candidates() -> tuple[Candidate, ...]:
    """Every candidate, in the order of the table."""
    from .low_rank import Truncation

    plain = [Candidate(name="float32"), Candidate(name="float16", quantize="float16")]
    small = [Candidate(name=name, quantize=name) for name in ("int8", "int4")]
    cut = Truncation()
    changes = {energy: partial(cut, energy=energy) for energy in (0.999999, 0.99, 0.95, 0.9)}
    thin = [
        Candidate(name=f"rank {energy:.0%} {quantize}", quantize=quantize, change=change)
        for energy, change in changes.items()
        for quantize in ("float16", "int8")
    ]
    fast = [
        Candidate(name="onnx", to="onnx"), Candidate(name="onnx int8", to="onnx", quantize="int8"),
        Candidate(name="onnx int8 tables", to="onnx", quantize="int8", change=int8_tables),
    ]  # fmt: skip
    return (*plain, *small, *thin, *fast)


def int8_tables(model: nn.Module) -> nn.Module:
    """A copy whose embeddings are stored in int8, which ONNX Runtime's own quantization leaves in float32."""
    from .quantize import Int8Embedding, quantize_embeddings

    model = copy.deepcopy(model)
    quantize_embeddings(model)
    if not any(isinstance(layer, Int8Embedding) for layer in model.modules()):
        raise CannotExport("it has no embedding that no other layer shares")
    return model


def least_bytes(model: nn.Module, candidate: Candidate) -> int:
    """Bytes of the tensors that `candidate` stores of `model` (already changed); a header or a graph comes on top.

    Of the torch forms they are counted by encoding them, which takes less time than one batch of validation.
    """
    from . import torch_file

    if candidate.to == "torch":
        axes, found = torch_file.channel_axes(model), 0
        for name, tensor in torch_file.stored(model):
            way = candidate.quantize if name in axes or candidate.quantize in torch_file.HALVES else None
            found += sum(part.nbytes for part in torch_file.encode(tensor, way, axes.get(name, 0), True)[1].values())
        return found
    products = _products(model) if candidate.quantize == "int8" else set()
    return sum(t.numel() if id(t) in products else t.nbytes for _, t in torch_file.stored(model))


def _products(model: nn.Module) -> set[int]:
    """The weights that become int8 products, by identity, but for those that an embedding needs in float32."""
    from torch import nn

    kinds = {True: set[int](), False: set[int]()}
    for layer in model.modules():
        if (weight := layer._parameters.get("weight")) is not None:
            kinds[isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"].add(id(weight))
    return kinds[True] - kinds[False]
