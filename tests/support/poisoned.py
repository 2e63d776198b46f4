"""A model that computes NaN when told to, on one rank or on all, and the run that trains it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from small import Small, loader

from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.trainer import Trainer
from shoestring.trainer.ledger import read


class Poisoned(Small):
    """Its loss is NaN in the micro-batches `at`, which count from 0, on rank `rank` alone."""

    def __init__(self, at: set[int], rank: int = 0) -> None:
        super().__init__()
        self.at, self.rank = at, rank

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx in self.at and self.trainer.global_rank == self.rank else loss


class Weights(pl.Callback):
    """The weights and the optimizer's moments after each step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        shards = shards_of(trainer, pl_module)
        moments = shards.state("net.weight").get("exp_avg", torch.zeros(0))
        self.seen.append([*shards.gather("net.weight", shards.master("net.weight")).flatten().tolist(),
                          *moments.tolist()])  # fmt: skip


def train(folder: Path, strategy: str, world: int, at: set[int], **options: object) -> dict:
    """Six steps over 16 samples a rank; what they left."""
    weights = Weights()
    trainer = Trainer(
        strategy=strategy, devices=world, run_dir=folder, ledger=False, accelerator="cpu", max_steps=6, max_epochs=-1,
        callbacks=[weights], checkpoint_every="1 steps", keep_checkpoints=9, **options,
    )  # fmt: skip
    trainer.fit(Poisoned(at, rank=world - 1), loader(64, batch=4))
    events = [r.fields for r in read(folder / "events", rank=world - 1) if r.fields.get("event") == "nonfinite"]
    return {"weights": weights.seen, "events": events, "steps": trainer.summary["nonfinite_steps"]}


def main(strategies: list[str], folder: Path) -> None:
    """On each of two ranks, one strategy after the other."""
    warnings.simplefilter("ignore")
    results = {name: train(folder / name, name, 2, {2}) for name in strategies}
    import os

    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))
