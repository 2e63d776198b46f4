"""Causal language modelling as a LightningModule."""

from __future__ import annotations

from typing import Any

import torch

from ...callbacks.forward.training_step import SAMPLE_WEIGHTS
from ..data.token_store import IGNORED
from .chunks import Chunked
from .isolation import check_causal, check_isolation
from .module import Batch, TaskModule, inputs, weighted
from .next_token import NextTokenLoss
from .positions import first_position


class CausalLM(TaskModule):
    """Next-token prediction with a Hugging Face model.

    **What the loss is averaged over.** Packed blocks all have `T - 1` targets, so the mean over a micro-batch is the
    per-token mean over the whole global batch once Lightning averages over accumulation and ranks; length warmup
    keeps that, since it cuts all rows alike. Padded batches differ in targets: the loss is then exact when each batch
    holds its `loss_weight` (see `weigh` in callbacks/sampling/global_batches.py), and otherwise a mean over
    micro-batches of per-token means. Neither needs communication.

    `val_loss` is the exact mean over all validation tokens of all ranks; `val_perplexity` is its exponential.

    The first batch checks, on the real model, that no token sees a later one. isolated: batches hold packed documents
    with restarting `position_ids`; it then also checks that documents do not see each other. opening: the tokens that
    open a document, for generation. chunked_loss: whether the logits of all positions never exist at once; "auto" where
    they would be large.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: Any, *, isolated: bool = False, opening: tuple[int, ...] = (),
        chunked_loss: Chunked = "auto",
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self._loss = NextTokenLoss(chunked_loss)
        self.opening = opening
        self._isolated, self._unchecked = isolated, True
        self._first_position = first_position(model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """At the first batch of a process: refuse a model that sees what it is not to see."""
        if not self._unchecked:
            return
        check_causal(self.model, batch["input_ids"][0])
        if self._isolated:
            check_isolation(self.model, batch["input_ids"][0])
        self._unchecked = False

    def trained_tokens(self, batch: Batch) -> torch.Tensor:
        """The targets of a batch []: no padding, no prompt, and nothing that has no token before it."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean cross entropy per target token, in nats []; 0 where there is no target."""
        total, targets = self._loss(self.model, inputs(batch, self._first_position), batch.get(SAMPLE_WEIGHTS))
        return weighted(total / targets.clamp(min=1), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch's summed cross entropy and its number of targets."""
        self.add(*self._loss(self.model, inputs(batch, self._first_position)))

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and `val_perplexity`, equal on all ranks."""
        loss, count = self.totals(2)
        self.log_all({"val_loss": loss / count, "val_perplexity": (loss / count).exp()})
