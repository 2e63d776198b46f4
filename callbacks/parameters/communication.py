"""Gradients on their way between ranks: what a technique makes of each bucket, under DDP.

DDP gives every bucket of gradients to one hook, when the last of them is ready in backward, and takes what it returns
for the mean over ranks. ZeRO reduces in DeepSpeed's engine, which has no such hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ... import IncompatibleTechniques

# a bucket -> a future of its flat gradient [n], the mean over ranks
Reduction = Callable[[dist.GradBucket], torch.futures.Future[Tensor]]


def set_reduction(trainer: pl.Trainer, reduction: Reduction, technique: str) -> bool:
    """Let `reduction` make the mean over ranks of each bucket of gradients, in place of DDP's own all-reduce.

    Args:
        trainer: Whose strategy has set the model up: call it in `on_train_start`.
        reduction: Called in backward, once for each bucket, in the same order on all ranks. It may start collectives.
        technique: Whose it is, for errors. Techniques that do so write the part "communication".

    Returns:
        Whether there is something to reduce: False on one device, where no gradient is communicated.

    Raises:
        IncompatibleTechniques: The strategy gives no hold on its gradients, or something else has taken it.
    """
    if trainer.world_size == 1:
        return False
    model = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel):
        raise IncompatibleTechniques(
            f"{technique} changes gradients as they are communicated, which only ddp allows; "
            f"this run has {type(trainer.strategy).__name__}"
        )
    try:
        model.register_comm_hook(None, lambda _, bucket: reduction(bucket))
    except RuntimeError as error:
        raise IncompatibleTechniques(f"{technique}: {error}") from None
    return True


def mean_over_ranks(bucket: dist.GradBucket, tensor: Tensor | None = None) -> torch.futures.Future[Any]:
    """DDP's own reduction, of the bucket's gradient or of a `tensor` instead: its mean over ranks, in place."""
    values = bucket.buffer() if tensor is None else tensor
    values.div_(dist.get_world_size())
    return dist.all_reduce(values, async_op=True).get_future().then(lambda done: done.value()[0])
