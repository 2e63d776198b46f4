"""What a model is worth on its run's own validation data, whatever computes it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from .runtimes import LogitsFunction, inputs
from .trained import Trained

ROWS = 32
IGNORED = -100


def quality(logits_of: LogitsFunction, trained: Trained, at_most: int | None = None) -> dict[str, Any]:
    """Loss and accuracy over all held-out samples; empty where there are none, or where the task is the user's own.

    at_most: so many of them instead, evenly spread over the set, always the same ones.

    Classifiers: `loss`, `accuracy`, `samples`, and `recall` of every class that occurs, by name; of several classes a
    row, of words, and of a regression, `loss`, `samples` and what the run has measured. Language models:
    `loss` per token in nats, `perplexity`, `accuracy` of the next token, `tokens`.
    """
    task = trained.task
    if task.validation is None:
        return {}
    held: Any = task.validation
    if at_most is not None and len(held) > at_most:
        held = Subset(held, [index * len(held) // at_most for index in range(at_most)])
    loader: Any = DataLoader(held, batch_size=ROWS, collate_fn=task.collate)
    if trained.kind in ("causal-lm", "seq2seq"):
        return _language(logits_of, loader, shift=trained.kind == "causal-lm")
    if trained.recipe.model.problem != "single-label" or trained.kind == "token-classification":
        return _of_problem(logits_of, loader, task.module)
    return _classes(logits_of, loader, task.facts["classes"]) if "classes" in task.facts else {}


def _language(logits_of: LogitsFunction, loader: Any, *, shift: bool) -> dict[str, Any]:
    """shift: a position predicts the next one's label, not its own."""
    loss = right = count = 0.0
    for batch in loader:
        logits, labels = logits_of(inputs(batch)).float(), batch["labels"]
        logits, labels = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
        logits, labels = logits.flatten(0, 1), labels.flatten()
        loss += float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += int((labels != IGNORED).sum())
    mean = loss / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "accuracy": right / count, "tokens": int(count)}


def _classes(logits_of: LogitsFunction, loader: Any, classes: list[str]) -> dict[str, Any]:
    loss, predictions, wanted = 0.0, [], []
    for batch in loader:
        logits = logits_of(inputs(batch)).float()
        loss += float(cross_entropy(logits, batch["labels"], reduction="sum"))
        predictions.append(logits.argmax(-1))
        wanted.append(batch["labels"])
    predicted, labels = torch.cat(predictions), torch.cat(wanted)
    return {
        "loss": loss / len(labels), "accuracy": float((predicted == labels).float().mean()), "samples": len(labels),
        "recall": recall(predicted, labels, classes),
    }  # fmt: skip


def _of_problem(logits_of: LogitsFunction, loader: Any, module: Any) -> dict[str, Any]:
    """By a classifier's own problem: of several classes, or of a number."""
    loss, samples, metric = 0.0, 0, module.problem.metric()
    for batch in loader:
        logits, labels = logits_of(inputs(batch)).float(), batch["labels"]
        if logits.ndim == 3:  # of words
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
        loss += float(module.problem.losses(logits, labels).sum())
        samples += len(labels)
        module.problem.update(metric, logits, labels)
    scores, _ = module.problem.scores(metric)
    return {"loss": loss / samples, "samples": samples, **{name: float(value) for name, value in scores.items()}}


def recall(predicted: Tensor, labels: Tensor, classes: list[str]) -> dict[str, float]:
    """Return, by name of each class in `labels` [N], the share of its samples that `predicted` [N] has right."""
    right = torch.bincount(labels[predicted == labels], minlength=len(classes))
    total = torch.bincount(labels, minlength=len(classes))
    return {name: hit / n for name, hit, n in zip(classes, right.tolist(), total.tolist(), strict=True) if n}
