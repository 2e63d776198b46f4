"""Torch's own optimizers, in one pass over memory instead of one for every operation, where torch has that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .groups import Named, decay_groups, decay_of


def adamw(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return _fused(torch.optim.AdamW, parameters, s, betas=tuple(s.betas), eps=s.eps)


def adam(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return _fused(torch.optim.Adam, parameters, s, betas=tuple(s.betas), eps=s.eps)


def sgd(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return _fused(torch.optim.SGD, parameters, s, momentum=s.momentum)


def _fused(cls: Callable[..., torch.optim.Optimizer], parameters: Named, s: Any, **own: Any) -> torch.optim.Optimizer:
    able = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for _, p in parameters)
    made = cls(decay_groups(parameters, decay_of(s)), lr=s.lr, fused=able or None, **own)
    # left to itself it would divide by the loss scale in its step: after gradients are clipped, which Lightning refuses
    made._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return made
