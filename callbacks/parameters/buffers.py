"""Buffers that training changes on each rank by itself: batch-norm statistics, codebooks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def agree_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, which are those that are kept: then it evaluates the model that is kept.

    DDP does so before each forward; DeepSpeed never does. Collective where there are several ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for buffer in module.buffers():
        by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    for buffers in by_kind.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, src=0)
        for buffer, agreed in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(agreed.view(buffer.shape))
