"""Classification of the words of a text as a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ...callbacks.forward.training_step import SAMPLE_WEIGHTS
from ..data.token_store import IGNORED
from .classify import Classifier
from .entities import are_entity_tags, entities
from .module import Batch, weighted
from .problems import SingleLabel


class Tagger(Classifier):
    """A class of each word, with a Hugging Face model that maps tokens [B, T] to logits [B, T, classes].

    `labels` [B, T] are classes at the first token of each word, and -100 elsewhere. The loss is the mean over words, of
    a global batch where each batch holds its `loss_weight`. Logs what `Classifier` does, of words; where classes are
    O, B-X and I-X, also `val_entity_f1`: an entity is right where its kind and all its words are (CoNLL-2003).
    """

    problem: SingleLabel

    def __init__(self, model: torch.nn.Module, optimizer: Any, classes: Sequence[str]) -> None:
        super().__init__(model, optimizer, SingleLabel(classes))
        self._entities = are_entity_tags(classes)

    def trained_tokens(self, batch: Batch) -> torch.Tensor:
        """The words of a batch [], of each of which one token carries loss."""
        return (batch["labels"] != IGNORED).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean cross entropy per word, in nats []."""
        logits, labels, weights = self(batch), batch["labels"], batch.get(SAMPLE_WEIGHTS)
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        if weights is not None:
            losses = losses * weights[:, None]
        return weighted(losses.sum() / (labels != IGNORED).sum().clamp(min=1), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch's summed loss, its number of words, its entities, and the confusion of classes."""
        logits, labels = self(batch), batch["labels"]
        words = labels != IGNORED
        losses = self.problem.losses(logits[words], labels[words])
        self.problem.update(self.metric, logits[words], labels[words])
        self.add(losses.sum(), words.sum(), *self._entity_counts(logits.argmax(-1), labels, words))

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and the scores, equal on all ranks; set `details`."""
        loss, count, right, predicted, wanted = self.totals(5)
        scores = {"entity_f1": 2 * right / (predicted + wanted).clamp(min=1)} if self._entities else {}
        self.log_scores(loss / count, scores)

    def _entity_counts(self, predicted: torch.Tensor, labels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """How many entities are right, predicted and wanted in a batch [3]."""
        counts, names = [0, 0, 0], self.problem.classes
        for row in range(len(labels)) if self._entities else ():
            ours, wanted = (
                entities([names[number] for number in numbers[row][words[row]].tolist()])
                for numbers in (predicted, labels)
            )
            for at, some in enumerate((ours & wanted, ours, wanted)):
                counts[at] += len(some)
        return torch.tensor(counts, device=labels.device)
