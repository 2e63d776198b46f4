"""DDP's gradients are summed in the same order by every attempt of a run.

DDP puts gradients into one order for its first sum and, having seen in which order they arrive, into another for all
later ones. Where three or more ranks add numbers, the order decides about the last bit: the first step of a resumed run
would differ from the same step of one that was never interrupted. So it sees gradients arrive once before any step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class _Zero(nn.Module):
    """A loss of 0 that depends on every parameter, the last ones first in backward; nothing is computed with them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._given = tuple(parameters)  # in a tuple they are not registered once more

    def forward(self) -> torch.Tensor:
        return torch.stack([p.sum().float() * 0 for p in self._given]).sum()


def settle_buckets(model: Any, world_size: int) -> None:
    """Bring DDP's buckets to the order that they keep. Collective: one sum of zeros over the ranks.

    Nothing happens to other models, to two ranks, whose sums have one order, or where DDP looks for unused parameters
    and keeps its first order. A static graph is left to be seen first in a real step, and a communication hook of the
    user's own is not called, for it may keep what it sees: such runs resume up to rounding.
    """
    if not isinstance(model, DistributedDataParallel) or world_size < 3:
        return
    if model.find_unused_parameters or model.static_graph or getattr(model, "_comm_hooks", None):
        return
    trained = [p for p in model.module.parameters() if p.requires_grad]
    module, sends = model.module, model.broadcast_buffers
    model.module, model.broadcast_buffers = _Zero(trained), False
    try:
        with torch.enable_grad():
            model().backward()
    finally:
        model.module, model.broadcast_buffers = module, sends
    for p in trained:
        p.grad = None
