"""Classification of token sequences and of images as a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy, one_hot

from ...callbacks.forward.training_step import SAMPLE_WEIGHTS
from .module import Batch, TaskModule, inputs, weighted


class Classifier(TaskModule):
    """One class per sample, with any model that maps a batch's tensors to logits [B, classes].

    The model gets every tensor of the batch but `labels` [B]; it returns logits, or an object that has them. Logs
    `val_loss` and `val_accuracy`, exact over all samples and ranks; `class_accuracy` then holds the accuracy of each
    class by name (absent classes are left out).
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, classes: Sequence[str]) -> None:
        super().__init__(model, optimizer)
        self.classes = list(classes)
        self.class_accuracy: dict[str, float] = {}

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [B, classes] in float32."""
        out = self.model(**{name: value for name, value in inputs(batch).items() if name != "labels"})
        return getattr(out, "logits", out).float()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean cross entropy per sample, in nats []."""
        weights = batch.get(SAMPLE_WEIGHTS)
        if weights is None:
            return weighted(cross_entropy(self(batch), batch["labels"]), batch)
        losses = cross_entropy(self(batch), batch["labels"], reduction="none")
        return weighted((losses * weights).mean(), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch's summed loss and, per class, how many samples it has and how many were right."""
        logits, labels = self(batch), batch["labels"]
        of_class = one_hot(labels, len(self.classes))
        right = of_class[logits.argmax(-1) == labels]
        self.add(cross_entropy(logits, labels, reduction="sum"), *of_class.sum(0), *right.sum(0))

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and `val_accuracy`, equal on all ranks; set `class_accuracy`."""
        size = len(self.classes)
        totals = self.totals(1 + 2 * size)
        counts, right = totals[1 : 1 + size], totals[1 + size :]
        self.log_all({"val_loss": totals[0] / counts.sum(), "val_accuracy": right.sum() / counts.sum()})
        rates = zip(self.classes, counts.tolist(), right.tolist(), strict=True)
        self.class_accuracy = {name: hits / count for name, count, hits in rates if count}
