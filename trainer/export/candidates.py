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
from typing import TYPE_CHECKING

from .trained import AS_TRAINED, CannotExport

if TYPE_CHECKING:
    from torch import nn

    from .torch_file import Ways
    from .trained import Trained

    Change = Callable[[Trained], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """name: as in the table. to, quantize: the export. change: a changed copy of a run's model; None: as it is.

    Candidates with one and the same `change` share the copy, and the trace of it for ONNX.
    """

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
        from .low_rank import factorized, ranks

        low_rank_model = factorized(trained.model, energy)
        if not ranks(low_rank_model):
            raise CannotExport(f"no layer is smaller at the rank that keeps {energy:.6g} of its energy")
        return low_rank_model

    return change


def one_shot(method: str, sparsity: float) -> Change:
    """Linear layers pruned by what they do to training samples of the run (see `one_shot.py`)."""

    def change(trained: Trained) -> nn.Module:
        from .one_shot import prune_one_shot
        from .runtimes import calibration

        model = copy.deepcopy(trained.model)
        prune_one_shot(model, calibration(trained), method, sparsity)
        return model

    return change


def all_candidates(trained: Trained) -> tuple[Candidate, ...]:
    """Every candidate for a run, in the order of the table."""
    plain = [Candidate(name="float32"), Candidate(name="float16", quantize="float16")]
    small = [Candidate(name=name, quantize=name) for name in ("int8", "int4")]
    aware = []
    if trained.rounding is not None:
        aware = [Candidate(name="as trained", quantize=AS_TRAINED)]
        if trained.rounding.activation_bits == 8:
            aware.append(Candidate(name="onnx as trained", to="onnx", quantize=AS_TRAINED))
    changes = {energy: low_rank(energy) for energy in (0.999999, 0.99, 0.95, 0.9)}
    factorized = [
        Candidate(name=f"rank {energy:.0%} {quantize}", quantize=quantize, change=change)
        for energy, change in changes.items()
        for quantize in ("float16", "int8")
    ]
    pruned = [
        Candidate(name=f"{method} 50% int8", quantize="int8", change=one_shot(method, 0.5))
        for method in ("sparsegpt", "wanda")
    ]
    fast = [
        Candidate(name="onnx", to="onnx"), Candidate(name="onnx int8", to="onnx", quantize="int8"),
        Candidate(name="onnx int8 tables", to="onnx", quantize="int8", change=int8_tables),
    ]  # fmt: skip
    return (*plain, *small, *aware, *factorized, *pruned, *fast)


def int8_tables(trained: Trained) -> nn.Module:
    """A copy whose embeddings are stored in int8, which ONNX Runtime's own quantization leaves in float32."""
    from .quantize import Int8Embedding, quantize_embeddings

    model = copy.deepcopy(trained.model)
    quantize_embeddings(model)
    if not any(isinstance(layer, Int8Embedding) for layer in model.modules()):
        raise CannotExport("it has no embedding that no other layer shares")
    return model


def least_bytes(model: nn.Module, candidate: Candidate, ways: Ways | None = None) -> int:
    """Bytes of the tensors that `candidate` stores of `model` (already changed); a header or a graph comes on top.

    Of the torch forms they are counted by encoding them, which takes less time than one batch of validation.
    """
    from . import torch_file

    if candidate.to == "torch":
        encoded = torch_file.encoded_tensors(model, candidate.quantize, True, ways)
        return sum(part.nbytes for _, _, parts in encoded for part in parts.values())
    products = _products(model) if candidate.quantize == "int8" else set()
    if candidate.quantize == AS_TRAINED:
        products = {id(p) for name, p in model.named_parameters() if name in (ways or {})} & _products(model)
    return sum(t.numel() if id(t) in products else t.nbytes for _, t in torch_file.stored(model))


def _products(model: nn.Module) -> set[int]:
    """The weights that become int8 products, by identity, but for those that an embedding needs in float32."""
    from torch import nn

    kinds = {True: set[int](), False: set[int]()}
    for layer in model.modules():
        if (weight := layer._parameters.get("weight")) is not None:
            kinds[isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"].add(id(weight))
    return kinds[True] - kinds[False]
