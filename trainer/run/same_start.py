"""What every strategy with several ranks asks of a model before it takes it over."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ... import ShoestringError


class CannotShard(ShoestringError):
    """A parameter cannot be taken apart."""


def check_dimensions(module: nn.Module, sharding: str) -> None:
    """Raise `CannotShard` where a parameter has no dimension: libraries fail on it while they send the model around."""
    if scalars := [name for name, p in module.named_parameters() if p.ndim == 0]:
        raise CannotShard(
            f"parameter {scalars[0]} is a number without dimensions, which {sharding} cannot shard. Give it the shape "
            "[1] (torch.ones(1)), or use ddp."
        )


def same_start(module: nn.Module) -> None:
    """Begin with the weights of rank 0: all is sent but what DDP was told to leave. Collective."""
    left = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in left:
            dist.broadcast(tensor.detach(), src=0)
