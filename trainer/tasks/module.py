"""What the tasks' LightningModules share: the optimizer by name, the weighted loss, sums over a validation run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from ...callbacks.forward.training_step import LOSS_WEIGHT, SAMPLE_WEIGHTS
from .optimizers.make import build_optimizer

if TYPE_CHECKING:
    from ..checkpoint.base import FrozenBase

Batch = dict[str, torch.Tensor]


class TaskModule(pl.LightningModule):
    """A model and the optimizer settings that train it.

    model: called with a batch's tensors by name. optimizer: the recipe's optimizer section. `configure_optimizers`
    returns the optimizer alone: the learning rate is driven from outside, by the budget's clock.

    frozen_base: weights that checkpoints need not hold. passing: the folder of files in which the weights lie until
    ZeRO-3 has cut them. details: what the last validation has found beside its metrics, for the run's report.
    """

    frozen_base: FrozenBase | None = None
    passing: Path | None = None
    details: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, model: torch.nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.model = model
        self.optimizer_settings = optimizer
        self._sums: torch.Tensor | None = None

    def published_names(self, names: Sequence[str]) -> tuple[str, dict[str, str]]:
        """How transformers and PEFT call these weights, and the files that they look for."""
        if hasattr(self.model, "peft_config"):
            from .lora import adapter_names

            theirs = adapter_names(self.model, [name.removeprefix("model.") for name in names])
            if len(theirs) == len(names):  # else the base is among them
                return "adapter_model", {f"model.{ours}": name for ours, name in theirs.items()}
        elif hasattr(self.model, "save_pretrained") and all(name.startswith("model.") for name in names):
            return "model", {name: name.removeprefix("model.") for name in names}
        return "model", {name: name for name in names}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the recipe over the parameters that train."""
        return build_optimizer(self.named_parameters(), self.optimizer_settings)

    def trained_tokens(self, batch: Batch) -> torch.Tensor | None:
        """How many tokens of a batch carry loss []; None where the loss is not over tokens."""
        return None

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the last validation."""
        self._sums = None

    def add(self, *values: torch.Tensor) -> None:
        """Add one batch's sums, in float64 on the device: no synchronisation until the end of the run."""
        sums = torch.stack([value.double() for value in values])
        self._sums = sums if self._sums is None else self._sums + sums

    def totals(self, size: int) -> torch.Tensor:
        """The sums [size] over all batches and ranks. Every rank must call it, at the same moment."""
        sums = self._sums if self._sums is not None else torch.zeros(size, dtype=torch.float64, device=self.device)
        return self.trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[return-value]

    def log_all(self, values: dict[str, torch.Tensor]) -> None:
        """Log metrics that `totals` already made equal on all ranks."""
        self.log_dict({k: v.float() for k, v in values.items()}, prog_bar=True, sync_dist=True)


def weighted(loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The mean loss times the batch's `loss_weight`, its share of the global mean, where the sampler gave one."""
    weight = batch.get(LOSS_WEIGHT)
    return loss if weight is None else loss * weight


def inputs(batch: Batch, first_position: int = 0) -> Batch:
    """The tensors that the model is called with: all but the weights. first_position: where its positions begin."""
    given = {name: value for name, value in batch.items() if name not in (LOSS_WEIGHT, SAMPLE_WEIGHTS)}
    if first_position and "position_ids" in given:
        given["position_ids"] = given["position_ids"] + first_position
    return given
