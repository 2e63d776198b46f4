"""Muon for hidden matrices, with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .groups import Named, decay_of, shape_of
from .of_torch import adamw
from .stepping import CannotStep


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden weight matrices, AdamW for embeddings, the output layer and everything not 2-D, as one.

    Source: Jordan et al., Muon (2024), and Liu et al., arXiv 2502.16982, whose scaling lets both share one learning
    rate. Two torch optimizers do the work; they share this one's `state` and parameter groups, so schedules and
    checkpoints see a single optimizer. Raises `CannotStep` where a parameter is not whole (ZeRO shards).
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
            raise CannotStep(
                "optimizer.name muon needs whole weight matrices, and ZeRO gives it flat shards. "
                "Use strategy.name single or ddp, or optimizer.name adamw."
            )
