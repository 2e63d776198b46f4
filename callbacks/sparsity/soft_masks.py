"""What techniques share that mask weights in the forward pass alone: the weights themselves stay, and may come back.

The mask reaches the layer through `forward_weights`, with a straight-through gradient: the parameter receives the dense
gradient of the masked weight. Every rank computes with whole weights, so it keeps whole masks: one byte a weight.
When the run has ended, the masked weights become the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..forward.forward_weights import ForwardWeights, straight_through
from ..parameters.accessor import shards_of
from ..parameters.shards import Shards
from .masks import Pruning, complete, must_find


class SoftMasking(Pruning):
    """Base of the techniques above. `update_masks` says which masks are new, `mask_dense_gradients` what is learned.

    Local state is in `_local`: state name -> parameter name -> this rank's slice; "forward" holds the masks.
    """

    def seen(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight that the layer computes with."""
        mask = self._whole.get(name)
        if mask is None or mask.shape != weight.shape:  # somebody tries the model that has just been cut
            return weight
        return straight_through(weight, weight.detach() * mask)

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._local: dict[str, dict[str, Tensor]] = {}
        self._whole: dict[str, Tensor] = {}
        self._shown: ForwardWeights | None = None
        self._states: list[str] = []  # what was in `_local` when it was saved, on whichever rank

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.active():
            return
        self._names = must_find(pl_module, self.skip, self.card.name)
        self._shown = ForwardWeights(pl_module, self._names, self.seen)
        shards = shards_of(trainer, pl_module)
        self._local = {s: complete(shards, self._names, self._local.get(s, {}), self.card.name) for s in self._states}
        if "forward" in self._local:
            self._spread(shards)
        elif not self.mask_version:
            self.begin(shards)

    def begin(self, shards: Shards) -> None:
        """Before the first step of a run that is not resumed."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._shown is not None:
            self._shown.check_used(self.card.name)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def apply_masks(self, shards: Shards, masks: Mapping[str, Tensor]) -> None:
        """Let the layers compute with these from the next forward on. Collective where sharded."""
        self._local["forward"] = dict(masks)
        self._spread(shards)
        self._kept = {name: float(mask.float().mean()) for name, mask in self._whole.items()}
        self.mask_version += 1

    def _spread(self, shards: Shards) -> None:
        masks = self._local["forward"]
        self._whole = {name: shards.gather(name, masks[name].bool()) for name in self._names}

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Somebody has cut the model, and the masks with it."""
        if self._shown is not None:
            self._shown.reinstall()
        if "forward" in self._local:
            self._spread(shards_of(trainer, pl_module))

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The masked weights become the weights."""
        if masks := self.final_masks(trainer, pl_module):
            shards = shards_of(trainer, pl_module)
            for name, mask in masks.items():
                shards.master(name).mul_(mask)
            shards.publish()

    def final_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Masks of this rank's slices at the end of the run."""
        return self._local.get("forward", {})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if getattr(self, "_shown", None) is not None:
            self._shown.remove()  # type: ignore[union-attr]
            self._shown = None

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "states": sorted(getattr(self, "_local", {}))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._states = list(state_dict["states"])

    def fragments(self) -> dict[str, dict[str, Tensor]]:
        return {state: dict(named) for state, named in getattr(self, "_local", {}).items()}

    def load_fragments(self, fragments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._local = {state: dict(named) for state, named in fragments.items()}
