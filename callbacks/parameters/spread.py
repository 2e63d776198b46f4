"""What accessors share whose ranks hold different slices: sums over ranks, and wholes made of every rank's part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .shards import Shards, Slice


def here(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: a view of a DTensor's part, all of any other one."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def in_parts(module: nn.Module) -> bool:
    """Whether no rank has whole parameters: under ZeRO-3 and FSDP2, but for what is being computed."""
    return any(hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in module.parameters())


class SpreadShards(Shards):
    """Ranks hold different slices."""

    replicated = False

    def _device(self) -> torch.device:
        """Where ranks communicate from."""
        raise NotImplementedError

    def total(self, values: Tensor) -> Tensor:
        staged = values.to(self._device())  # NCCL takes nothing from the host, where masters may lie
        dist.all_reduce(staged)
        return staged.to(values.device)

    def gather_slice(self, where: Slice, local: Tensor) -> Tensor:
        whole = torch.zeros(where.numel, dtype=_summable(local.dtype), device=self._device())
        where.cut(whole).copy_(local)
        dist.all_reduce(whole)  # slices do not overlap, so the sum is the whole
        return whole.view(where.shape).to(local.dtype)


def _summable(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.bool else dtype
