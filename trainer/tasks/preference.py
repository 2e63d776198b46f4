"""Preference tuning as LightningModules: of pairs (DPO, IPO, ORPO, SimPO), and of single answers (KTO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...callbacks.forward.isolated_step import evaluating
from ...callbacks.forward.training_step import SAMPLE_WEIGHTS
from ...callbacks.sampling.samples import order_of
from ...recipes.preference_schema import PreferenceSpec
from ..data.errors import TaskError
from ..data.preferences import Preferences, pad_together
from ..data.token_store import IGNORED
from . import preference_losses as losses
from .chunks import Chunked
from .isolation import check_causal
from .language import CausalLM
from .module import Batch, weighted
from .reference import CachedReference, frozen_reference
from .rewards import METRICS, metrics_of, sums_of


class Scores(NamedTuple):
    """Log-probabilities of answers [R], their tokens [R], and the cross entropy of whole documents [R]."""

    log_probabilities: Tensor
    tokens: Tensor
    entropies: Tensor

    @property
    def means(self) -> Tensor:
        """Log-probabilities of a token [R]."""
        return self.log_probabilities / self.tokens.clamp(min=1)


class Preference(CausalLM):
    """What the losses have in common: log-probabilities of answers, and of the reference.

    Args:
        model: A causal language model, maybe with adapters; the base without them is then the reference.
        optimizer: The recipe's optimizer section.
        section: The loss, and its settings.
        reference: Log-probabilities of a reference that is none of the model; None: nothing is cached.
        pad: The token that fills rows up.
        opening: The tokens that open a document, for generation.
        chunked_loss: As of `CausalLM`.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: Any, section: PreferenceSpec, *,
        reference: CachedReference | None = None, pad: int = 0, opening: tuple[int, ...] = (),
        chunked_loss: Chunked = "auto",
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer, opening=opening, chunked_loss=chunked_loss)
        self.section, self.cached, self.pad = section, reference, pad

    def on_fit_start(self) -> None:
        """Before the first step of a run, compute what the answers' log-probabilities are now."""
        if self.cached is not None:
            self.cached.prepare(self.trainer, self._documents, begun=self.trainer.global_step > 0)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """At the first batch of a process: refuse a model that sees what it is not to see."""
        if self._unchecked:
            check_causal(self.model, batch["input_ids"].flatten(0, -2)[0])
        self._unchecked = False

    def trained_tokens(self, batch: Batch) -> Tensor:
        """The tokens of a batch's answers [], of both of a pair."""
        return (batch["labels"][..., 1:] != IGNORED).sum()

    def answers(self, batch: Batch, *, whole: bool = False) -> Scores:
        """What the model makes of documents. whole: the entropies are of all their tokens, else of answers.

        batch: `input_ids`, `labels` and `attention_mask`, each [R, T].
        """
        ids, labels = batch["input_ids"], batch["labels"]
        targets = torch.where(batch["attention_mask"].bool(), ids, IGNORED) if whole else labels
        each = self._loss.by_token(self.model, {"input_ids": ids, "labels": targets})
        answered = labels[:, 1:] != IGNORED
        return Scores(-(each * answered).sum(1), answered.sum(1), each.sum(1))

    def referred(self, batch: Batch) -> Tensor:
        """The reference's log-probabilities of documents [R]."""
        with frozen_reference(self.model):
            return self.answers(batch).log_probabilities

    def _documents(self, documents: Sequence[Batch]) -> Tensor:
        """Log-probabilities of single documents, as the reference would have them."""
        batch = {name: value.to(self.device) for name, value in pad_together(documents, self.pad).items()}
        with self.trainer.precision_plugin.forward_context():
            return self.referred(batch)


class PairwisePreference(Preference):
    """Chosen against rejected answers. Batches are of `Preferences` in pairs: `input_ids` [B, 2, T] and their like.

    The loss is the mean over the pairs of the global batch, as micro-batches hold equally many. ORPO's cross entropy is
    the mean over the tokens of all its chosen documents, prompts included, and exact where each batch holds its
    `loss_weight`. `val_loss` and the metrics are exact over all pairs of all ranks: `val_accuracy`, the share of pairs
    whose chosen answer has the higher reward, `val_margin`, by how much on average, `val_chosen_reward` and
    `val_rejected_reward`. Rewards are log ratios to the reference times beta; where there is none (orpo, simpo), mean
    log-probabilities of a token times beta.
    """

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss of the pairs []."""
        loss, _, entropies = self._pairs(batch)
        weights = batch.get(SAMPLE_WEIGHTS)
        total = loss.mean() if weights is None else (loss * weights).mean()
        if entropies is None:
            return total
        of_rows = entropies if weights is None else entropies * weights
        return total + weighted(of_rows.sum() / _targets(batch), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch's summed losses and rewards."""
        loss, rewards, entropies = self._pairs(batch)
        nothing = loss.new_zeros(())
        beside = (nothing, nothing) if entropies is None else (entropies.sum(), _targets(batch))
        self.add(*sums_of(loss, rewards), *beside)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and what the rewards are, equal on all ranks."""
        *sums, entropy, targets = self.totals(7)
        metrics = metrics_of(sums)
        self.log_all({**metrics, "val_loss": metrics["val_loss"] + entropy / targets.clamp(min=1)})

    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses [B], rewards [B, 2], and of ORPO cross entropies of chosen documents [B]."""
        section, beta = self.section, self.section.strength
        rows = {name: batch[name].flatten(0, 1) for name in ("input_ids", "labels", "attention_mask")}
        of = self.answers(rows, whole=section.loss == "orpo")
        if not section.kind.reference:
            means = of.means.view(-1, 2)
            chosen, rejected = means.unbind(1)
            rewards = beta * means.detach()
            if section.loss == "orpo":
                return losses.orpo(chosen, rejected, beta=beta), rewards, of.entropies.view(-1, 2)[:, 0]
            smoothing, margin = section.label_smoothing, section.margin
            return (
                losses.simpo(chosen, rejected, beta=beta, margin=margin, label_smoothing=smoothing), rewards, None
            )  # fmt: skip
        reference = _cached(batch) if self.cached is not None else self.referred(rows).view(-1, 2)
        ratios = of.log_probabilities.view(-1, 2) - reference
        rewards = beta * ratios.detach()
        if section.loss == "ipo":
            chosen, rejected = (ratios / of.tokens.view(-1, 2).clamp(min=1)).unbind(1)
            return losses.ipo(chosen, rejected, beta=beta), rewards, None
        chosen, rejected = ratios.unbind(1)
        return losses.dpo(chosen, rejected, beta=beta, label_smoothing=section.label_smoothing), rewards, None


class SinglePreference(Preference):
    """Wanted and unwanted answers, by KTO. Batches are of `Preferences` in single answers.

    The loss is the mean over the answers of the global batch. Its divergence is estimated as TRL does, from answers put
    after the prompt of another row, but over the whole global batch, before its first micro-batch: so it is the same
    however the batch is cut into ranks and micro-batches. TRL's is that of each micro-batch, as is ours in a trainer
    without our order of samples.

    `val_loss` and the metrics are exact over all answers of all ranks: the divergence is that of the whole set,
    `val_accuracy` the share of answers whose log ratio is above it where they are wanted and below where not,
    `val_margin` the mean reward of the wanted ones less that of the others.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_buffer("divergence", torch.zeros(()), persistent=False)
        self._kept: list[Tensor] = []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Where a step begins, see how far the model is from its reference."""
        super().on_train_batch_start(batch, batch_idx)
        order = order_of(self.trainer)
        drawn = None if order is None else order.drawn(batch_idx)
        data = self.trainer.train_dataloader.dataset
        data = getattr(data, "dataset", data)
        if drawn is None:
            mine = batch["index"].tolist()
        elif batch_idx % self.trainer.accumulate_grad_batches:
            return
        else:
            mine = [int(i) for i in drawn.everybodys[self.trainer.global_rank :: self.trainer.world_size]]
        size, sums = len(batch["index"]), []
        for start in range(0, len(mine), size):
            sums.append(self._mismatched(data, mine[start : start + size]))
        total = torch.stack([torch.cat(sums).sum(), torch.tensor(float(len(mine)), device=self.device)])
        total = self.trainer.strategy.reduce(total, reduce_op="sum")  # type: ignore[assignment]
        self.divergence = (total[0] / total[1]).clamp(min=0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss of the answers []."""
        loss = self._losses(self._ratios(batch), batch["wanted"], self.divergence)
        weights = batch.get(SAMPLE_WEIGHTS)
        return loss.mean() if weights is None else (loss * weights).mean()

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        super().on_validation_epoch_start()
        self._kept = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the log ratios of this batch, and add those of mismatched answers."""
        loaders = self.trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, list) else loaders
        apart = self._mismatched(loader.dataset, batch["index"].tolist())
        self.add(apart.sum(), apart.new_tensor(len(apart)))
        self._kept.append(torch.stack([self._ratios(batch), batch["wanted"].float()]))

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and what the rewards are, equal on all ranks."""
        beta = self.section.strength
        apart, count = self.totals(2)
        divergence = (apart / count).clamp(min=0)
        self._sums = None
        for ratios, labels in (kept.unbind() for kept in self._kept):
            wanted = labels > 0.5
            right = (ratios > divergence) == wanted
            loss = self._losses(ratios.double(), wanted, divergence)
            sums = [(ratios * mask).sum() for mask in (wanted, ~wanted)]
            self.add(loss.sum(), right.sum(), *sums, wanted.sum(), (~wanted).sum())
        loss, right, chosen, rejected, ours, others = self.totals(6)
        chosen, rejected = beta * chosen / ours.clamp(min=1), beta * rejected / others.clamp(min=1)
        metrics = (right / (ours + others), chosen - rejected, chosen, rejected)
        self.log_all({"val_loss": loss / (ours + others), **dict(zip(METRICS, metrics, strict=True))})

    def _ratios(self, batch: Batch) -> Tensor:
        """Log ratios of the answers of a batch [B]."""
        reference = _cached(batch) if self.cached is not None else self.referred(batch)
        return self.answers(batch).log_probabilities - reference

    def _mismatched(self, data: Preferences, indices: Sequence[int]) -> Tensor:
        """Log ratios of answers to other prompts [b]."""
        documents = pad_together([data.document(index, 1) for index in indices], self.pad)
        batch = {name: value.to(self.device) for name, value in documents.items()}
        with self.trainer.precision_plugin.forward_context(), torch.no_grad(), evaluating(self.model):
            now = self.answers(batch).log_probabilities
            if self.cached is None:
                return now - self.referred(batch)
        assert data.reference is not None
        return now - data.reference[list(indices), 1].to(now)

    def _losses(self, ratios: Tensor, wanted: Tensor, divergence: Tensor) -> Tensor:
        section = self.section
        return losses.kto(
            ratios, wanted, divergence, beta=section.strength, desirable_weight=section.desirable_weight,
            undesirable_weight=section.undesirable_weight,
        )  # fmt: skip


def _targets(batch: Batch) -> Tensor:
    """Tokens of the chosen documents of a batch that have one before them []."""
    return batch["attention_mask"][:, 0, 1:].sum()


def _cached(batch: Batch) -> Tensor:
    if "reference" not in batch:
        raise TaskError("the reference's log-probabilities are computed when a fit begins, and none has begun.")
    return batch["reference"]
