"""SynFlow: prune before training without cutting any layer off, and without labels (arXiv 2006.05467)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..contract import MIXING, Card, IncompatibleTechniques
from ..forward.isolated_step import loss_of
from . import saliency, schedules
from .at_init import PruneAtInit, Weights, gradients_of

ROUNDS = 100  # of the paper


class SynFlow(PruneAtInit):
    """Before training, keep the weights that carry most of the flow from input to output, in a hundred rounds.

    The flow is the sum of the last pruned layer's outputs when all parameters are positive and inputs are 1 (token ids
    stay as they are); a weight's share is |w dR/dw|. The training data must be there when the run is set up, and the
    model whole (not made under zero.Init).

    Source: arXiv 2006.05467.

    Args:
        sparsity: Share of weights that are 0 from the first step to the last, in [0, 1).
        samples: Has no effect here: one sample is looked at.
        distribution: global (all layers ranked together) | uniform | erk, or name patterns with each its own sparsity.
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import SynFlow
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[SynFlow(sparsity=0.95)])
    """

    card = Card(
        name="synflow",
        does="prunes before training, in rounds that cut no layer off",
        paper="2006.05467",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses={*MIXING, "model.dtype nf4 or int8"},  # codes have no absolute value, which the flow is of
    )

    def wanted(self) -> int:
        return 1  # more would be the same ones again, but for token ids

    def scores(self, module: pl.LightningModule, weights: Weights, batches: Sequence[Any]) -> dict[str, Tensor]:
        ones = tree_map(lambda x: torch.ones_like(x) if torch.is_tensor(x) and x.is_floating_point() else x, batches[0])
        batch = move_data_to_device(ones, module.device)
        signed = {name: p.detach().clone() for name, p in module.named_parameters()}
        masks = {name: torch.ones_like(p) for name, p in weights.items()}
        flow: dict[str, Tensor] = {}
        try:
            for done in range(ROUNDS):
                _set(module, {n: p.abs() * masks[n] if n in masks else p.abs() for n, p in signed.items()})
                flow = _flow(module, weights, batch)
                masks = self._kept_after(flow, schedules.rounds(done + 1, ROUNDS, self.sparsity))
        finally:
            _set(module, signed)
        return flow  # of the last round, where what was cut before is 0

    def _kept_after(self, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        now = type(self)(**{**self.settings(), "sparsity": sparsity})
        return {name: mask.to(scores[name]) for name, mask in now._choose(scores).items()}


def _set(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(values[name])


def _flow(module: pl.LightningModule, weights: Weights, batch: Any) -> dict[str, Tensor]:
    """|w dR/dw|, where R sums the outputs of the pruned layer that runs last. Dropout is off."""
    pruned, last = {id(p) for p in weights.values()}, []
    module.eval()
    with ExitStack() as hooks:
        for layer in module.modules():
            if id(layer._parameters.get("weight")) in pruned:
                handle = layer.register_forward_hook(lambda layer, inputs, output: last.append(output))
                hooks.callback(handle.remove)
        loss_of(module, batch)
    if not last:
        raise IncompatibleTechniques("synflow: none of the layers to prune runs in training_step")
    gradients = gradients_of(last[-1].sum(), list(weights.values()))
    return {name: saliency.taylor(p, g).detach() for (name, p), g in zip(weights.items(), gradients, strict=True)}
