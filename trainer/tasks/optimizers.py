"""Optimizers by name. The learning rate is a starting value: the budget's clock drives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .errors import TaskError
from .optimizer_cards import optimizer_card

Named = Sequence[tuple[str, nn.Parameter]]


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], settings: Any) -> torch.optim.Optimizer:
    """One optimizer over the named parameters that train.

    settings: the recipe's optimizer section (`name`, `lr`, `weight_decay`, `betas`, `eps`, `momentum`). Weight decay
    leaves out parameters of fewer than two dimensions: biases, norms, gains.
    """
    build: Any = optimizer_card(settings.name).builder()
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


def decay_of(settings: Any) -> float:
    """Return the recipe's weight decay, else 0.1 where decay acts beside the gradient (arXiv 1711.05101). Within the
    gradient, as in SGD and Adam, so much would undo the training: 0."""
    if settings.weight_decay is not None:
        return float(settings.weight_decay)
    return 0.0 if settings.name in ("sgd", "adam") else 0.1


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape: under ZeRO-3 its own is that of an empty placeholder."""
    return getattr(parameter, "ds_shape", parameter.shape)


def decay_groups(parameters: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices with decay, everything of fewer dimensions without. Empty groups are left out."""
    decayed = [p for _, p in parameters if len(shape_of(p)) >= 2]
    plain = [p for _, p in parameters if len(shape_of(p)) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(parameters, decay_of(s)), lr=s.lr, betas=tuple(s.betas), eps=s.eps)


def adam(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(decay_groups(parameters, decay_of(s)), lr=s.lr, betas=tuple(s.betas), eps=s.eps)


def sgd(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(decay_groups(parameters, decay_of(s)), lr=s.lr, momentum=s.momentum)


def adafactor(parameters: Named, s: Any) -> torch.optim.Optimizer:
    # its eps is a pair with another meaning: keep its own
    return torch.optim.Adafactor(decay_groups(parameters, decay_of(s)), lr=s.lr)


def muon(parameters: Named, s: Any) -> torch.optim.Optimizer:
    return MuonWithAdamW(parameters, s)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden weight matrices, AdamW for embeddings, the output layer and everything not 2-D, as one.

    Source: Jordan et al., Muon (2024), and Liu et al., arXiv 2502.16982, whose scaling lets both share one learning
    rate. Two torch optimizers do the work; they share this one's `state` and parameter groups, so schedules and
    checkpoints see a single optimizer. Raises `TaskError` where a parameter is not whole (ZeRO shards).
    """

    def __init__(self, parameters: Named, settings: Any) -> None:
        matrices = [(n, p) for n, p in parameters if _is_hidden_matrix(n, p)]
        others = [(n, p) for n, p in parameters if not _is_hidden_matrix(n, p)]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            momentum, decay = settings.momentum or 0.95, decay_of(settings)
            muon = torch.optim.Muon(
                [p for _, p in matrices],
                lr=settings.lr,
                momentum=momentum,
                weight_decay=decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self._parts.append(muon)
        if others:
            self._parts.append(adamw(others, settings))
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": settings.lr})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and hand the restored groups and state back to the two parts."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            if isinstance(part, torch.optim.Muon):
                _check_whole(part.param_groups)
            part.step()
        return loss

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    outer = ("embed", "wte", "wpe", "lm_head", "classifier", "score")
    return len(shape_of(parameter)) == 2 and not any(word in name for word in outer)


def _check_whole(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        if any(p.ndim != 2 for p in group["params"]):
            raise TaskError(
                "optimizer.name muon needs whole weight matrices, and ZeRO gives it flat shards. "
                "Use strategy.name single or ddp, or optimizer.name adamw."
            )
