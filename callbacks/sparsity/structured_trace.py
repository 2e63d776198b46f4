"""Run a module's own training step aside: nothing of it is logged, and buffers and modes come back as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from .structured_groups import CannotTrace

LOGS = ("log", "log_dict")


@contextmanager
def set_apart(module: pl.LightningModule) -> Iterator[None]:
    """Inside, `training_step` logs nothing and what it does to buffers is undone."""
    buffers = [(part, dict(part._buffers)) for part in module.modules()]
    kept = {id(b): b.clone() for b in module.buffers()}
    shadowed = {name: vars(module)[name] for name in LOGS if name in vars(module)}
    for name in LOGS:
        vars(module)[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for part, own in buffers:
            part._buffers.update(own)
        with torch.no_grad():
            for b in module.buffers():
                b.copy_(kept[id(b)])
        for name in LOGS:
            del vars(module)[name]
        vars(module).update(shadowed)


def loss_of(module: pl.LightningModule, batch: Any) -> Tensor:
    """The loss of the module's training step on `batch`."""
    given = copy.copy(batch) if isinstance(batch, dict) else batch  # which a step may take apart
    step: Callable[..., Any] = module.training_step
    out = step(given, 0)
    loss = out["loss"] if isinstance(out, Mapping) else out
    if not isinstance(loss, Tensor):
        raise CannotTrace(f"training_step returned {type(loss).__name__} and no loss, so it cannot be traced")
    return loss


def try_out(module: pl.LightningModule, forward: Callable[[], Tensor]) -> None:
    """Raise `CannotTrace` if the module that has been cut does not run."""
    with set_apart(module), torch.no_grad():
        try:
            forward()
        except Exception as error:
            raise CannotTrace(
                f"the model does not run with fewer channels: {type(error).__name__}: {error}. "
                "Some layer's width is written into its forward: name its parameters in structured_pruning's `skip`."
            ) from error
