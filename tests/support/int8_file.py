"""A model of a test's own in ONNX Runtime's int8, by the steps of an export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shoestring.callbacks.compression.fake_quantization import PRODUCT_BITS
from shoestring.trainer.export.onnx_file import left, quantize_file, trace
from shoestring.trainer.export.quantize import bake, quantize_embeddings
from shoestring.trainer.export.runtimes import LogitsFunction, onnxruntime


def int8_file(
    model: nn.Module,
    batch: dict[str, Tensor],
    path: Path,
    *,
    cpu: str = "any",
    embeddings: bool = False,
    **rounding: Any,
) -> LogitsFunction:
    """Write `model` with int8 products to `path` and open it; `model` stays as it is. rounding: scale, skip."""
    served, bits = copy.deepcopy(model).eval(), PRODUCT_BITS[cpu]
    kept = left(served, bake(served, bits, **rounding))
    if embeddings:
        quantize_embeddings(served)
    trace(served, batch, path)
    quantize_file(path, kept, bits, on_grid=True)
    return onnxruntime(path, threads=1)
