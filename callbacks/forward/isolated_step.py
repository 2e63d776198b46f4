"""Run a module's own training step aside from training: to score weights, or to trace what depends on what."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from .training_step import NoLoss

LOGS = ("log", "log_dict")
_asked = 0  # how many `evaluating` are open


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in, frozen ones too.

    What it computes here answers a question about it and is no part of a training step, even if it is asked within one.
    """
    global _asked
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    _asked += 1
    try:
        yield
    finally:
        _asked -= 1
        for module, mode in modes:
            module.training = mode


def is_evaluating() -> bool:
    """Whether a model is in `evaluating`."""
    return _asked > 0


@contextmanager
def isolated_training_step(module: pl.LightningModule) -> Iterator[None]:
    """Inside, `training_step` logs nothing; buffers, modes and attributes that it adds are afterwards as they were.

    What is compiled runs uncompiled: it shows every operation, and can be differentiated twice.
    """
    buffers = [(part, dict(part._buffers)) for part in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    modes = [(part, part.training) for part in module.modules()]
    before = set(vars(module))
    shadowed = {name: vars(module)[name] for name in LOGS if name in vars(module)}
    for name in LOGS:
        vars(module)[name] = lambda *_, **__: None
    try:
        with uncompiled():
            yield
    finally:
        for left in set(vars(module)) - before:
            delattr(module, left)
        vars(module).update(shadowed)
        for part, own in buffers:
            part._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for part, training in modes:
            part.training = training


def uncompiled() -> AbstractContextManager[Any]:
    """What is compiled runs as it was written, and is not compiled anew for other shapes."""
    if "torch._dynamo" not in sys.modules:  # which takes seconds to import: nothing is compiled
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def loss_of(module: pl.LightningModule, batch: Any) -> Tensor:
    """The loss of the module's training step on `batch`."""
    given = copy.copy(batch) if isinstance(batch, dict) else batch  # which a step may take apart
    step: Callable[..., Any] = module.training_step
    out = step(given, 0)
    loss = out["loss"] if isinstance(out, Mapping) else out
    if not isinstance(loss, Tensor):
        raise NoLoss(f"training_step returned {type(loss).__name__} and no loss")
    return loss
