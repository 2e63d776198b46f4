"""What a model takes: parameters, FLOPs, bytes on disk, memory of a process that runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ...callbacks.accounting.flops import FlopCounter, Flops
from ..checkpoint.weights import base_of_weights
from .runtimes import Batch, eager, needed
from .trained import CannotExport

WEIGHTS = (".safetensors", ".onnx", ".data", ".bin", ".pt")


def weight_bytes(path: Path) -> int:
    """Bytes of the weights' files in a folder (tokenizer and settings aside), or of the one file.

    A run's weights count with the frozen base that they were trained beside.
    """
    if path.is_file():
        return path.stat().st_size
    base = base_of_weights(path)
    own = sum(p.stat().st_size for p in path.rglob("*") if p.suffix in WEIGHTS and p.is_file())
    return own + (base["bytes"] if base is not None else 0)


def parameters(model: nn.Module) -> dict[str, int]:
    """`parameters`, shared ones once, and how many of them are not 0 (`nonzero`)."""
    weights = list(model.parameters())
    return {"parameters": sum(p.numel() for p in weights), "nonzero": sum(int((p != 0).sum()) for p in weights)}


def onnx_parameters(path: Path) -> dict[str, int]:
    """The same of an ONNX file: its initializers of one axis or more, scales and zero points of quantization aside."""
    onnx = needed("onnx")
    import numpy as np

    total = nonzero = 0
    for tensor in onnx.load(str(path)).graph.initializer:
        quantizer = tensor.name.endswith(("_scale", "_zero_point"))
        kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        if tensor.dims and tensor.data_type in kinds and not quantizer:
            values = onnx.numpy_helper.to_array(tensor)
            total, nonzero = total + values.size, nonzero + int(np.count_nonzero(values))
    return {"parameters": total, "nonzero": nonzero}


def forward_flops(model: nn.Module, batch: Batch) -> Flops:
    """Count the FLOPs of a forward: realised, as torch runs it; counted, products times the non-zero share."""
    densities = {
        p.untyped_storage().data_ptr(): float((p != 0).float().mean()) for p in model.parameters() if p.ndim >= 2
    }
    with FlopCounter(densities) as counter:
        eager(model)(batch)
    return counter.flops


# -- memory ----------------------------------------------------------------------------------------------------------
def peak_memory(wanted: str, data: str | None, backend: str, shape: Sequence[int], allow_code: bool) -> dict[str, int]:
    """Memory of a fresh process that opens the model and runs one batch.

    `peak_bytes`: the most that was resident while it ran, interpreter and libraries included; `over_idle_bytes`: that
    less what was resident once the libraries were loaded, before the model was opened.
    """
    question = {"wanted": wanted, "data": data, "backend": backend, "shape": list(shape), "allow_code": allow_code}
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.peak", json.dumps(question)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotExport(f"memory of {wanted} could not be measured: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process that are resident now, or at most since `forget_peak` (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Give freed memory back and let VmHWM start from what is resident now (Linux; else it keeps the whole life's)."""
    import contextlib
    import ctypes
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def random_batch(shape: Sequence[int], like: Batch, vocabulary: int) -> Batch:
    """A batch of `shape` ([rows, length] of tokens, or [rows] of what `like` holds): the same numbers each time."""
    draw = torch.Generator().manual_seed(0)
    rows = shape[0]
    if "input_ids" not in like:
        return {k: v[:1].repeat(rows, *[1] * (v.ndim - 1)) for k, v in like.items()}
    ids = torch.randint(0, vocabulary, (rows, shape[1]), generator=draw)
    target = {"decoder_input_ids": ids} if "decoder_input_ids" in like else {}  # as long as its source
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **target}
