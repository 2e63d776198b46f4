"""Optimizers of hidden matrices, with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .groups import Named, decay_of, shape_of
from .of_torch import adamw
from .wholes import MATRICES, WholeStepping


class HiddenMatrices(WholeStepping):
    """Steps the hidden weight matrices in `update_part`, by AdamW embeddings, the output layer and all that is not 2-D.

    Args:
        parameters: By name.
        settings: The recipe's optimizer section.
        of_matrices: What else the group of the matrices holds.

    Raises:
        CannotStep: In its step, where another strategy than ours has cut the matrices.
    """

    def __init__(self, parameters: Named, settings: Any, **of_matrices: Any) -> None:
        matrices = [p for n, p in parameters if _is_hidden_matrix(n, p)]
        others = [(n, p) for n, p in parameters if not _is_hidden_matrix(n, p)]
        groups: list[dict[str, Any]] = []
        if matrices:
            groups.append({"params": matrices, "weight_decay": decay_of(settings), MATRICES: True, **of_matrices})
        self._adamw = adamw(others, settings) if others else None
        super().__init__([*groups, *(self._adamw.param_groups if self._adamw else ())], {"lr": settings.lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts."""
        loss = None
        if closure is not None:  # it sets gradients to zero, of all groups
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if group.get(MATRICES)]
        try:
            super().step()
        finally:
            self.param_groups = groups
        others = [group for group in groups if not group.get(MATRICES)]
        if self._adamw is not None and others:
            self._adamw.state, self._adamw.param_groups = self.state, others
            self._adamw.step()
        return loss

    def by_slices(self, group: dict[str, Any]) -> bool:
        """Those of matrices; AdamW's share are DTensors."""
        return self.steps_slices and bool(group.get(MATRICES))


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    outer = ("embed", "wte", "wpe", "lm_head", "classifier", "score")
    return len(shape_of(parameter)) == 2 and not any(word in name for word in outer)
