"""A model of a few hundred weights that does everything right, and faults that can be planted in it or beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from shoestring.callbacks.contract import Card, IncompatibleTechniques, Technique
from shoestring.callbacks.forward.training_step import Chosen, Step, choose_samples, remove_from_step
from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.callbacks.parameters.communication import mean_over_ranks, set_reduction
from shoestring.callbacks.sampling.samples import install_sampler

WORDS, WIDTH, LENGTH, SAMPLES = 23, 8, 12, 22


class Texts(Dataset[dict[str, Tensor]]):
    """Rows of different lengths, or packed rows of one length that hold three documents each."""

    deterministic = True

    def __init__(self, packed: bool) -> None:
        draw = torch.Generator().manual_seed(3)
        self.packed = packed
        lengths = torch.full((SAMPLES,), LENGTH) if packed else torch.randint(3, LENGTH + 1, (SAMPLES,), generator=draw)
        self.rows = [torch.randint(1, WORDS, (int(length),), generator=draw) for length in lengths]
        self.target_counts = np.array([len(row) - 1 for row in self.rows])

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {"input_ids": self.rows[index], "labels": self.rows[index].clone()}
        begins = torch.tensor([0, 3 + index % 3, 9])
        if self.packed:
            at = torch.arange(LENGTH)
            sample["position_ids"] = at - begins[(at[:, None] >= begins).sum(1) - 1]
        return sample


def texts(packed: bool = True) -> tuple[Texts, Texts]:
    return Texts(packed), Texts(packed)


class Reader(pl.LightningModule):
    """Predicts the next word from the mean of the words before it, in the same document.

    isolates: documents of a packed row do not see each other. weighs: the loss is a mean over the global batch's words.
    dropout: of a layer, of its own numbers drawn by torch's generator, or by a generator that nobody has seeded.
    """

    def __init__(self, isolates: bool = True, weighs: bool = True, dropout: str = "layer") -> None:
        super().__init__()
        self.isolates, self.weighs, self.kind = isolates, weighs, dropout
        self.words, self.dropout, self.out = nn.Embedding(WORDS, WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, WORDS)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        at = torch.arange(ids.shape[1], device=ids.device)
        sees = (at[:, None] >= at).expand(len(ids), -1, -1)
        if self.isolates and "position_ids" in batch:
            document = (batch["position_ids"] == 0).cumsum(1)
            sees = sees & (document[:, :, None] == document[:, None, :])
        mean = sees.float() / sees.sum(-1, keepdim=True)
        logits = self.out(self._dropped(torch.tanh(mean @ self.words(ids))))
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return loss * batch["loss_weight"] if self.weighs and "loss_weight" in batch else loss

    def _dropped(self, hidden: Tensor) -> Tensor:
        if self.kind == "layer":
            return self.dropout(hidden)
        generator = None
        if self.kind == "unseeded":
            generator = torch.Generator()
            generator.seed()
        return hidden * (torch.rand(hidden.shape, generator=generator) > 0.2) / 0.8

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@dataclass(kw_only=True, eq=False, repr=False)
class DropsPartialWindow(Technique, pl.Callback):
    """An epoch ends with its last whole global batch, where that is accumulated."""

    card = Card(name="drops_partial_window", does="drops the last window")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        order = install_sampler(trainer, trainer.seed)  # type: ignore[attr-defined]
        assert order is not None
        order.drop_last = trainer.accumulate_grad_batches > 1


@dataclass(kw_only=True, eq=False, repr=False)
class ShortestHere(Technique, pl.Callback):
    """Trains on the half of the samples with the smallest first words, as far as one rank and micro-batch sees."""

    card = Card(name="shortest_here", does="chooses among local samples", writes={"samples"})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        choose_samples(pl_module, self)

    def choose(self, step: Step) -> Chosen:
        first = step.batch["input_ids"][:, 0]
        return Chosen(first.argsort()[: max(1, len(first) // 2)])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        remove_from_step(pl_module, self)  # type: ignore[arg-type]


@dataclass(kw_only=True, eq=False, repr=False)
class ReducesTwice(Technique, pl.Callback):
    """Adds up over ranks what is their mean already."""

    card = Card(name="reduces_twice", does="reduces twice", writes={"gradients"})

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        shards = shards_of(trainer, pl_module)
        for name in shards.slices if trainer.world_size > 1 and shards.replicated else ():
            dist.all_reduce(shards.gradient(name))


@dataclass(kw_only=True, eq=False, repr=False)
class AveragesFirstShard(Technique, pl.Callback):
    """Averages the weights, on every rank those that the first one has as many of."""

    card = Card(name="averages_first_shard", does="averages the wrong slice", reads={"weights"})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        shards = shards_of(trainer, pl_module)
        now = {name: shards.whole(name).detach().flatten()[: s.length].clone() for name, s in shards.slices.items()}
        self.averages = {name: value.lerp(now[name], 0.1) for name, value in getattr(self, "averages", now).items()}

    def fragments(self) -> dict[str, dict[str, Tensor]]:
        return {"ema": self.averages} if hasattr(self, "averages") else {}

    def load_fragments(self, fragments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.averages = dict(fragments["ema"])


@dataclass(kw_only=True, eq=False, repr=False)
class ReducesInBf16(Technique, pl.Callback):
    """Sends gradients as bfloat16, under ddp."""

    card = Card(name="reduces_in_bf16", does="reduces in bfloat16", writes={"communication"})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def reduction(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            return mean_over_ranks(bucket, bucket.buffer().bfloat16()).then(lambda done: done.value().float())

        with suppress(IncompatibleTechniques):
            set_reduction(trainer, reduction, self.card.name)
