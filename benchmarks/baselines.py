"""What stands in every table of compressed models: bytes of the file that is really written, and models of its size."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from shoestring.trainer.export import torch_file
from shoestring.trainer.export.trained import AS_TRAINED


def written(
    model: nn.Module, quantize: str | None = None, sparse: bool = False, ways: torch_file.Ways | None = None
) -> tuple[int, nn.Module]:
    """(bytes of the file that holds `model`, the model read back from it). See trainer/export/torch_file.py.

    ways: what weights were trained to be, for that instead of `quantize`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        torch_file.save(model, path, quantize=AS_TRAINED if ways else quantize, sparse=sparse, about={}, ways=ways)
        return path.stat().st_size, torch_file.filled(model, path)


def widest(fits: Callable[[int], bool], most: int = 4096) -> int:
    """The largest width below `most` that fits, where every smaller one does too; at least 1."""
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def width_for(build: Callable[[int], nn.Module], limit: int) -> int:
    """The largest width, below 512, whose dense model takes at most `limit` bytes on disk."""
    return widest(lambda width: written(build(width))[0] <= limit, 512)


def sparsity_for(model: nn.Module, limit: int) -> float:
    """The share of zeros among the weights of linear layers with which `model`, stored sparse, takes `limit` bytes."""
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if written(_thinned(model, middle), sparse=True)[0] <= limit else (middle, high)
    return high


@torch.no_grad()
def _thinned(model: nn.Module, share: float) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.fill_(1.0).view(-1)[: int(share * layer.weight.numel())] = 0.0
    return model
