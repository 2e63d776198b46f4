"""Optimizers by name. The learning rate is a starting value: the budget's clock drives it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...data.errors import TaskError
from .adafactor import Adafactor
from .adamw8bit import AdamW4bit, AdamW8bit
from .cards import optimizer_card
from .groups import Named, decay_groups, decay_of
from .lion import Lion
from .low_rank import APOLLO, GaLore
from .muon import MuonWithAdamW
from .of_torch import adam, adamw, sgd
from .schedule_free import ScheduleFreeAdamW
from .soap import SOAP


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], settings: Any) -> torch.optim.Optimizer:
    """One optimizer over the named parameters that train.

    settings: the recipe's optimizer section (`name`, `lr`, `weight_decay`, `betas`, `eps`, `momentum`). Weight decay
    leaves out parameters of fewer than two dimensions: biases, norms, gains.
    """
    build = maker(settings.name)
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    if not trained:
        raise TaskError("optimizer: no parameter of this model trains (all are frozen).")
    if isinstance(build, type) and issubclass(build, torch.optim.Optimizer):
        groups: Any = decay_groups(trained, decay_of(settings))
        return build(groups, lr=settings.lr)  # type: ignore[call-arg]
    made = build(trained, settings)
    if not isinstance(made, torch.optim.Optimizer):
        raise TaskError(f"optimizer.name: {settings.name} made {made!r}, which is not a torch.optim.Optimizer.")
    return made


def maker(name: str) -> Any:
    """What makes the optimizer of this name: a function of this module or of somebody else, or a class of torch's."""
    make = optimizer_card(name).make
    return globals()[make] if isinstance(make, str) else make


def lion(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return Lion(decay_groups(parameters, decay_of(s)), lr=s.lr, betas=tuple(s.betas))


def schedule_free_adamw(parameters: Named, s: Any) -> torch.optim.Optimizer:
    groups = decay_groups(parameters, decay_of(s))
    return ScheduleFreeAdamW(groups, lr=s.lr, betas=tuple(s.betas), eps=s.eps)


def adamw8bit(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return AdamW8bit(decay_groups(parameters, decay_of(s)), lr=s.lr, betas=tuple(s.betas), eps=s.eps)


def adamw4bit(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return AdamW4bit(decay_groups(parameters, decay_of(s)), lr=s.lr, betas=tuple(s.betas), eps=s.eps)


def adafactor(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return Adafactor(parameters, s)


def muon(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return MuonWithAdamW(parameters, s)


def soap(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return SOAP(parameters, s)


def galore(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return GaLore(parameters, s)


def apollo(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return APOLLO(parameters, s)


__all__ = [
    "adafactor",
    "adam",
    "adamw",
    "adamw4bit",
    "adamw8bit",
    "apollo",
    "build_optimizer",
    "galore",
    "lion",
    "maker",
    "muon",
    "schedule_free_adamw",
    "sgd",
    "soap",
]
