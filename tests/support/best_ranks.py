"""A run whose evaluations are judged: alone, and on ranks that measure different things."""

from __future__ import annotations

import os
from pathlib import Path

import small
import torch

from shoestring.trainer import Budget


class Judged(small.Small):
    """Measures the next of `scores` at every evaluation after the trial; keeps the weights that it saw."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = iter(scores)
        self.evaluated: list[torch.Tensor] = []
        self.trained: list[list[float]] = []  # before each step

    def training_step(self, batch, batch_idx):
        self.trained.append(self.net.weight.detach().flatten().tolist())
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        trial = self.trainer.sanity_checking
        self.score = 0.0 if trial else next(self.scores)
        if not trial:
            self.evaluated.append(self.net.weight.detach().clone())

    def validation_step(self, batch, batch_idx):
        self.log("val_score", torch.tensor(self.score))


def main(names: list[str], folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in names:
        scores = [0.1, 0.9, 0.5] if rank == 0 else [0.3, 0.2, 0.1]
        small.train(
            folder / name, Budget(steps=6), module=Judged(scores), validation=small.loader(8), best="max val_score",
            check_val_every_n_epoch=None, val_check_interval=2, strategy=name, devices=world,
        )  # fmt: skip
