"""When memory runs out: what filled it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ...callbacks.parameters.spread import here

if TYPE_CHECKING:
    import pytorch_lightning as pl


_SAID = ("can't allocate memory", "DefaultCPUAllocator", "out of memory")
REST = "activations, logits and buffers"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there is no more memory, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _SAID)


def note_memory(error: BaseException, trainer: pl.Trainer, module: pl.LightningModule, run_dir: Path) -> None:
    """Leave in `error` what fills the memory, while the frames that hold the activations still exist.

    On a GPU a snapshot of its allocator is kept in the run's folder.
    """
    if not is_out_of_memory(error):
        return
    device = trainer.strategy.root_device
    counted = held(trainer, module)
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        counted |= {REST: allocated - sum(counted.values()), "fragmentation": reserved - allocated}
        with suppress(Exception):  # a message without a snapshot is better than none
            snapshot = run_dir / f"out-of-memory-rank{trainer.global_rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            error.snapshot = snapshot  # type: ignore[attr-defined]
    else:
        counted[REST] = psutil.Process().memory_info().rss - sum(counted.values())
    error.held = {name: max(0, value) for name, value in counted.items()}  # type: ignore[attr-defined]


def held(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, int]:
    """Bytes of the model states that this rank holds, each tensor once."""
    seen: set[int] = set()

    def count(tensors: Iterator[Any]) -> int:
        total = 0
        for tensor in map(here, (one for one in tensors if isinstance(one, torch.Tensor))):
            if tensor.numel() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.untyped_storage().nbytes()
        return total

    # DeepSpeed's optimizer steps another one, whose parameters are the masters
    own = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
    parameters = list(module.parameters())
    masters = [p for optimizer in own for group in optimizer.param_groups for p in group["params"]]
    states = [entries for optimizer in own for entries in optimizer.state.values()]
    return {
        "weights": count(iter(parameters)),
        "master weights": count(iter(masters)),
        "gradients": count(p.grad for p in [*parameters, *masters]),
        "optimizer states": count(value for entries in states for value in entries.values()),
    }
