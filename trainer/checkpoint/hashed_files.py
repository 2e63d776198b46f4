"""Files that are hashed while they are written: what is on the disk is not read again to know its sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_TYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def write_hashed(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write the parts one after another, durably; what a manifest says of the file: {"bytes", "sha256"}.

    Raises:
        OSError: The disk refuses it.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in parts:
            digest.update(part)
            size += len(part)
            left = memoryview(part)
            while left:  # a write may be cut short
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def safetensors_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The parts of a safetensors file, which its own library would write without telling what: header, then tensors.

    Args:
        tensors: On the host, contiguous.
        metadata: Strings for its header.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        kind = _TYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].nbytes:
            yield bytes_of(tensors[name])


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, as it is."""
    import torch

    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
