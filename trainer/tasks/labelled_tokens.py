"""Prediction of the token that belongs to a place, hidden or next in a target, as LightningModules."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ...callbacks.forward.training_step import SAMPLE_WEIGHTS
from ..data.token_store import IGNORED
from .module import Batch, TaskModule, inputs, weighted


class LabelledTokens(TaskModule):
    """The tokens `labels` [B, T] of a batch, -100 where there is none, with a model whose logits [B, T, V] are of them.

    The loss is the mean over labelled tokens, of a global batch where each batch holds its `loss_weight`, as in
    `CausalLM`. `val_loss` is the exact mean over all validation tokens of all ranks, `val_perplexity` its exponential,
    `val_accuracy` the share of them that is guessed right.
    """

    def trained_tokens(self, batch: Batch) -> torch.Tensor:
        """The labelled tokens of a batch []."""
        return (batch["labels"] != IGNORED).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean cross entropy per labelled token, in nats []; 0 where none is."""
        logits, labels, labelled = self._labelled(batch)
        losses = cross_entropy(logits, labels, reduction="none")
        weights = batch.get(SAMPLE_WEIGHTS)
        if weights is not None:
            losses = losses * weights[:, None].expand_as(labelled)[labelled]
        return weighted(losses.sum() / max(1, len(losses)), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch's summed cross entropy, how many tokens are labelled, and how many are right."""
        logits, labels, _ = self._labelled(batch)
        right = logits.argmax(-1) == labels
        self.add(cross_entropy(logits, labels, reduction="sum"), torch.ones_like(labels).sum(), right.sum())

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss`, `val_perplexity` and `val_accuracy`, equal on all ranks."""
        loss, count, right = self.totals(3)
        mean = loss / count
        self.log_all({"val_loss": mean, "val_perplexity": mean.exp(), "val_accuracy": right / count})

    def _labelled(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [M, V] in float32 and tokens [M] where there is a label, and where that is [B, T]."""
        labels = batch["labels"]
        labelled = labels != IGNORED
        logits = self.model(**{name: value for name, value in self.given(batch).items() if name != "labels"}).logits
        return logits[labelled].float(), labels[labelled], labelled

    def given(self, batch: Batch) -> Batch:
        """What the model is called with, labels beside it."""
        return inputs(batch)


class MaskedLM(LabelledTokens):
    """The hidden tokens of a text, with a Hugging Face model that sees all others (BERT, arXiv 1810.04805)."""


class Seq2SeqLM(LabelledTokens):
    """The tokens of a target, with an encoder that reads the source and a decoder (T5, arXiv 1910.10683).

    Batches hold `decoder_input_ids` [B, T], the labels one place later; or the model makes them of the labels.
    """

    def given(self, batch: Batch) -> Batch:
        """What the model is called with, labels beside it."""
        if "decoder_input_ids" in batch:
            return inputs(batch)
        model: Any = self.model
        return {**inputs(batch), "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
