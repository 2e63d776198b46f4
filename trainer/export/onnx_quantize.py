"""The fast int8 path on CPUs: ONNX Runtime's dynamic quantization (QInt8 weights, MatMul), from a torch model.

ONNX Runtime quantizes what enters a product per tensor, to unsigned 8 bits with a zero point, where training by
`quantization_aware(activation_bits=8)` does it per token and symmetrically: outputs agree to about one percent, not to
the bit. The weights' codes are those of training.
Unsigned weights (QUInt8) would run at two thirds of the speed, so they are not offered.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...callbacks.compression.fake_quantization import PRODUCT_BITS, product_bits
from .onnx_file import left, program_of, quantize_file
from .quantize import CannotQuantize, bake, quantize_embeddings
from .runtimes import open_session

Example = tuple[Tensor, ...] | Mapping[str, Tensor]


class OnnxModel:
    """An ONNX file as a callable on CPU tensors: positional or by the names of its inputs; returns a tuple of tensors.

    threads: of one operator; None leaves it to ONNX Runtime.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path = Path(path)
        self._session = open_session(path, threads)
        self.inputs = [each.name for each in self._session.get_inputs()]

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        if sorted(given) != sorted(self.inputs) or len(args) + len(kwargs) != len(self.inputs):
            raise CannotQuantize(f"{self.path.name} takes {', '.join(self.inputs)}; {len(given)} inputs were given")
        found = self._session.run(None, {name: value.detach().cpu().numpy() for name, value in given.items()})
        return tuple(torch.from_numpy(each) for each in found)


def export_onnx(model: nn.Module, example: Example, path: str | Path, dynamic: Any = None) -> Path:
    """Write `model` in eval mode to `path` as ONNX. dynamic: `dynamic_shapes` of torch.export, None for fixed shapes.

    example: a tuple of positional, or a mapping of named, inputs.
    """
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), None)
    training = model.training
    try:
        program = program_of(model.eval(), args, kwargs=kwargs, dynamic_shapes=dynamic)
        program.save(str(path), external_data=False)
    finally:
        model.train(training)
    return Path(path)


def quantize_onnx(
    model: nn.Module,
    example: Example,
    path: str | Path,
    weight_bits: int = 8,
    *,
    cpu: str = "any",
    scale: str = "absmax",
    skip: Sequence[str] = (),
    embeddings: bool = False,
    dynamic: Any = None,
    threads: int | None = None,
) -> OnnxModel:
    """Write a copy of `model` with int8 matrix products to `path` and open it; `model` stays as it is.

    Settings as of `quantize.quantize`. Convolutions keep rounded weights in floats. Fewer than 8 bits are stored in 8.
    Raises `CannotExport` when a linear layer did not become an int8 product.
    """
    served = copy.deepcopy(model).eval()
    bits = product_bits(weight_bits, cpu)
    kept = left(served, bake(served, bits, scale=scale, skip=skip))
    if embeddings:
        quantize_embeddings(served)
    quantize_file(export_onnx(served, example, path, dynamic), kept, PRODUCT_BITS[cpu], on_grid=True)
    return OnnxModel(path, threads)
