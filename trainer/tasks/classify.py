"""Classification of token sequences and of images, and regression, as a LightningModule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ...callbacks.forward.training_step import SAMPLE_WEIGHTS
from .module import Batch, TaskModule, inputs, weighted
from .problems import Problem


class Classifier(TaskModule):
    """A label of each sample, with any model that maps a batch's tensors to logits [B, outputs].

    The model gets every tensor of the batch but `labels` [B, ...]; it returns logits, or an object that has them. What
    is lost and measured is the problem's. Logs `val_loss`, in which all samples weigh alike, and the problem's scores,
    exact over all samples and ranks; what they are of stands in `details`.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, problem: Problem) -> None:
        super().__init__(model, optimizer)
        self.problem, self.metric = problem, problem.metric()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [B, outputs] in float32."""
        out = self.model(**{name: value for name, value in inputs(batch).items() if name != "labels"})
        return getattr(out, "logits", out).float()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """The mean loss of the samples []."""
        losses = self.problem.losses(self(batch), batch["labels"])
        for factors in (self.problem.weights(batch["labels"]), batch.get(SAMPLE_WEIGHTS)):
            if factors is not None:
                losses = losses * factors
        return weighted(losses.mean(), batch)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        super().on_validation_epoch_start()
        self.metric.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch's summed loss, its number of samples, and what the problem's metric sees."""
        logits, labels = self(batch), batch["labels"]
        losses = self.problem.losses(logits, labels)
        self.add(losses.sum(), torch.tensor(len(losses), device=losses.device))
        self.problem.update(self.metric, logits, labels)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and the problem's scores, equal on all ranks; set `details`."""
        loss, count = self.totals(2)
        self.log_scores(loss / count, {})

    def log_scores(self, loss: torch.Tensor, more: Mapping[str, torch.Tensor]) -> None:
        """Log a loss [] that is equal on all ranks, the problem's scores, and more of them; set `details`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*compute.*method of metric", UserWarning)  # a rank without samples
            scores, details = self.problem.scores(self.metric)
        self.log_all({"val_loss": loss, **{f"val_{name}": value for name, value in {**scores, **more}.items()}})
        if not self.trainer.sanity_checking:
            self.details = details
