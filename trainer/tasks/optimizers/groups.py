"""Parameter groups: which parameters decay, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Named = Sequence[tuple[str, nn.Parameter]]


def decay_of(settings: Any) -> float:
    """Return the recipe's weight decay, else 0.1 where decay acts beside the gradient (arXiv 1711.05101). Within the
    gradient, as in SGD and Adam, so much would undo the training: 0."""
    if settings.weight_decay is not None:
        return float(settings.weight_decay)
    return 0.0 if settings.name in ("sgd", "adam") else 0.1


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape: under ZeRO-3 its own is that of an empty placeholder."""
    return getattr(parameter, "ds_shape", parameter.shape)


def decay_groups(parameters: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices with decay, everything of fewer dimensions without. Empty groups are left out."""
    decayed = [p for _, p in parameters if len(shape_of(p)) >= 2]
    plain = [p for _, p in parameters if len(shape_of(p)) < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0},
    ]  # fmt: skip
    return [group for group in groups if group["params"]]
