"""When memory runs out: what filled it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from ...callbacks.parameters.spread import here

if TYPE_CHECKING:
    import pytorch_lightning as pl


_SAID = ("can't allocate memory", "DefaultCPUAllocator", "out of memory")
REST = "all else"  # gradients on their way, temporaries, the batch, libraries


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
    """Bytes of model states, activations and logits that this rank holds, each piece of memory once."""
    seen: set[int] = set()

    def count(tensors: Iterable[Any]) -> int:
        total = 0
        for tensor in map(here, (one for one in tensors if isinstance(one, Tensor))):
            if tensor.numel():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
        return total

    # DeepSpeed's optimizer steps another one, whose parameters are the masters
    own = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
    parameters = list(module.parameters())
    masters = [p for optimizer in own for group in optimizer.param_groups for p in group["params"]]
    states = [entries for optimizer in own for entries in optimizer.state.values()]
    counted = {
        "weights": count(parameters),
        "master weights": count(masters),
        "gradients": count(p.grad for p in [*parameters, *masters]),
        "optimizer states": count(value for entries in states for value in entries.values()),
    }
    count(module.buffers())
    computed, wide = list(_computed(trainer.strategy.root_device)), _vocabulary(module)
    logits = count(t for t in computed if wide and t.ndim and t.shape[-1] == wide and t.is_contiguous())
    return {**counted, "activations": count(computed), "logits": logits}


def _computed(device: torch.device) -> Iterator[Tensor]:
    """What the forward pass has made on `device` and still holds, by Python's names or for backward.

    What checkpointing has not kept is not computed again for this.
    """
    with torch.no_grad():
        named = [each for each in gc.get_objects() if _is_tensor(each) and each.grad_fn is not None]
    left, met = [tensor.grad_fn for tensor in named], set()
    yield from (tensor for tensor in named if _lies_on(tensor, device))
    while left:
        node: Any = left.pop()
        if node is None or node in met:
            continue
        met.add(node)
        left += [following for following, _ in node.next_functions]
        for key in dir(node):
            if key.startswith("_raw_saved"):
                yield from (tensor for tensor in _kept(node, key) if _lies_on(tensor, device))


def _lies_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether it has memory on `device`: what a compiler has traced a model with says so, and has none."""
    try:
        return tensor.device == device and tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def _is_tensor(each: object) -> bool:
    return issubclass(type(each), Tensor)  # `isinstance` would ask proxies of other libraries what they stand for


def _kept(node: Any, key: str) -> Iterator[Tensor]:
    with suppress(RuntimeError):  # freed already
        saved = getattr(node, key)
        for each in saved if isinstance(saved, list | tuple) else (saved,):
            if isinstance(tensor := getattr(each, "data", None), Tensor):
                yield tensor


def _vocabulary(module: pl.LightningModule) -> int:
    """How many logits a language model has for a token; 0 where there is no such model."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            return int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    return 0
