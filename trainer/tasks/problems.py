"""What is predicted of a sample: its loss, and the metrics of all samples.

A problem counts in one metric of torchmetrics, which adds up what all ranks have seen: a confusion matrix, of which
accuracy, F1 and the table of classes follow, or, for a regression, the numbers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .class_scores import ClassScores

if TYPE_CHECKING:
    from torchmetrics import Metric

# by name: what is logged of an evaluation; by name: what its report has besides, as JSON takes it
Scores = tuple[dict[str, Tensor], dict[str, Any]]


class Problem(Protocol):
    """One way to look at a model's logits [B, outputs] and at labels."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample [B], not weighted."""
        ...

    def weights(self, labels: Tensor) -> Tensor | None:
        """The factor of each sample's loss in training [B]; None: 1."""
        ...

    def metric(self) -> Metric:
        """A new metric that has seen nothing."""
        ...

    def update(self, metric: Any, logits: Tensor, labels: Tensor) -> None:
        """Let the metric see a batch."""
        ...

    def scores(self, metric: Any) -> Scores:
        """What the metric has seen, on all ranks. Every rank must call it at the same moment."""
        ...


class SingleLabel:
    """One class of a sample, by softmax and cross entropy in nats.

    class_weights: the factor of each class's losses [classes].
    """

    def __init__(self, classes: Sequence[str], class_weights: Tensor | None = None) -> None:
        self.classes, self._weights = list(classes), class_weights

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropies [B]."""
        return cross_entropy(logits, labels, reduction="none")

    def weights(self, labels: Tensor) -> Tensor | None:
        """Those of the samples' classes [B]."""
        if self._weights is None:
            return None
        self._weights = self._weights.to(labels.device)  # copied once
        return self._weights[labels]

    def metric(self) -> Metric:
        """The confusion matrix [classes, classes]: rows are what was wanted."""
        from torchmetrics.classification import MulticlassConfusionMatrix

        return MulticlassConfusionMatrix(len(self.classes), validate_args=False)

    def update(self, metric: Any, logits: Tensor, labels: Tensor) -> None:
        """Count the class with the largest logit."""
        metric.update(logits.argmax(-1), labels)

    def scores(self, metric: Any) -> Scores:
        """Accuracy, which micro F1 equals here, and macro F1; the table of classes and the confusion matrix."""
        matrix = metric.compute()
        scores = ClassScores.of_matrix(matrix)
        logged = {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "micro_f1": scores.micro_f1}
        return logged, {"classes": scores.table(self.classes), "confusion_matrix": matrix.tolist()}


class MultiLabel:
    """Any number of classes of a sample: a sigmoid and a binary cross entropy for each, whose mean is the loss."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean binary cross entropies [B] of logits and labels [B, classes]."""
        return binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)

    def weights(self, labels: Tensor) -> None:
        """All weigh alike."""

    def metric(self) -> Metric:
        """The confusion matrix of each class [classes, 2, 2], and how many samples are right in all."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MultilabelConfusionMatrix, MultilabelExactMatch

        kinds = {"matrix": MultilabelConfusionMatrix, "exact": MultilabelExactMatch}
        parts: Any = {name: kind(len(self.classes), validate_args=False) for name, kind in kinds.items()}
        return MetricCollection(parts, compute_groups=False)  # type: ignore[return-value]

    def update(self, metric: Any, logits: Tensor, labels: Tensor) -> None:
        """Count every class of more than one half."""
        metric.update((logits > 0).long(), labels.long())

    def scores(self, metric: Any) -> Scores:
        """Micro and macro F1, and the share of samples that are right in every class; the table of classes."""
        computed = metric.compute()
        scores = ClassScores.of_binary(computed["matrix"])
        logged = {"exact_match": computed["exact"], "macro_f1": scores.macro_f1, "micro_f1": scores.micro_f1}
        return logged, {"classes": scores.table(self.classes)}


class Regression:
    """A number of a sample, by its squared error."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Squared errors [B] of logits [B, 1]."""
        return (logits[:, 0] - labels.float()).square()

    def weights(self, labels: Tensor) -> None:
        """All weigh alike."""

    def metric(self) -> Metric:
        """The numbers themselves: a rank correlation needs them all."""
        from torchmetrics import CatMetric

        return CatMetric(nan_strategy="disable")

    def update(self, metric: Any, logits: Tensor, labels: Tensor) -> None:
        """Keep what was predicted, and what was wanted."""
        metric.update(torch.stack([logits[:, 0], labels.float()], -1))

    def scores(self, metric: Any) -> Scores:
        """Mean squared and absolute errors, R², and Spearman's rank correlation; the last two take two samples."""
        from torchmetrics.functional import (
            mean_absolute_error,
            mean_squared_error,
            r2_score,
            spearman_corrcoef,
        )

        predicted, wanted = metric.compute().double().unbind(-1)
        logged = {"mse": mean_squared_error(predicted, wanted), "mae": mean_absolute_error(predicted, wanted)}
        if len(wanted) > 1:
            logged |= {"r2": r2_score(predicted, wanted), "spearman": spearman_corrcoef(predicted, wanted)}
        return logged, {}


def problem_of(kind: str, classes: Sequence[str] | None, class_weights: Tensor | None = None) -> Problem:
    """The problem of a recipe's `model.problem`; of the classes that its data have."""
    if kind == "regression":
        return Regression()
    if kind == "multi-label":
        return MultiLabel(classes or ())
    return SingleLabel(classes or (), class_weights)
