"""Masked language modelling as a LightningModule."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from ...callbacks.forward.training_step import SAMPLE_WEIGHTS
from ..data.token_store import IGNORED
from .module import Batch, TaskModule, inputs, weighted


class MaskedLM(TaskModule):
    """The hidden tokens of a text, with a Hugging Face model that sees all others (BERT, arXiv 1810.04805).

    The loss is the mean over hidden tokens, of a global batch where each batch holds its `loss_weight`, as in
    `CausalLM`. `val_loss` is the exact mean over all hidden validation tokens of all ranks, `val_perplexity` its
    exponential, `val_accuracy` the share of them that is guessed right.
    """

    def trained_tokens(self, batch: Batch) -> torch.Tensor:
        """The hidden tokens of a batch []."""
        return (batch["labels"] != IGNORED).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean cross entropy per hidden token, in nats []; 0 where none is."""
        logits, labels, hidden = self._hidden(batch)
        losses = cross_entropy(logits, labels, reduction="none")
        weights = batch.get(SAMPLE_WEIGHTS)
        if weights is not None:
            losses = losses * weights[:, None].expand_as(hidden)[hidden]
        return weighted(losses.sum() / max(1, len(losses)), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch's summed cross entropy, how many tokens are hidden, and how many are right."""
        logits, labels, _ = self._hidden(batch)
        right = logits.argmax(-1) == labels
        self.add(cross_entropy(logits, labels, reduction="sum"), torch.ones_like(labels).sum(), right.sum())

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss`, `val_perplexity` and `val_accuracy`, equal on all ranks."""
        loss, count, right = self.totals(3)
        mean = loss / count
        self.log_all({"val_loss": mean, "val_perplexity": mean.exp(), "val_accuracy": right / count})

    def _hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [M, V] in float32 and tokens [M] where one is hidden, and where that is [B, T]."""
        labels = batch["labels"]
        hidden = labels != IGNORED
        logits = self.model(**{name: value for name, value in inputs(batch).items() if name != "labels"}).logits
        return logits[hidden].float(), labels[hidden], hidden
