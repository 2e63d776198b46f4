"""Loaders of a user's own on one rank of a group: what each rank is shown, in training and after it."""

import json
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
from small import Small, samples
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from shoestring.trainer import Trainer


class Reversed(DistributedSampler):
    """This rank's share, from its end."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


class EveryOther(Sampler):
    """Aware of ranks, and no subclass of torch's."""

    def __init__(self, size: int, rank: int, world_size: int) -> None:
        self.size, self.rank, self.world_size = size, rank, world_size

    def __len__(self) -> int:
        return self.size // self.world_size

    def __iter__(self):
        return iter(range(self.rank, self.size, self.world_size))


class OwnLoader(DataLoader):
    pass


class Shown(Small):
    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, list[int]] = {"train": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.shown["train"] += batch[1].tolist()
        return super().training_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.shown["test"] += batch[1].tolist()

    def predict_step(self, batch, batch_idx):
        self.shown["predict"] += batch[1].tolist()


def fit_all(folder: Path) -> None:
    """One epoch of sixteen samples from each loader, then test and predict on eight; in our trainer, or Lightning's."""
    warnings.simplefilter("ignore")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = samples(16)
    loaders = {
        "plain": lambda: DataLoader(data, 4),
        "subclass": lambda: DataLoader(data, 4, sampler=Reversed(data, world, rank, shuffle=False)),
        "ranks": lambda: DataLoader(data, 4, sampler=EveryOther(16, rank, world)),
        "loader": lambda: OwnLoader(data, 4),
    }
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    reports = {}
    for name, make in loaders.items():
        trainer = Trainer(
            max_epochs=1, run_dir=folder / name, ledger=False, accelerator="cpu", strategy="ddp", devices=world
        )
        trainer.monitor.totals.peak_flops = 1e9
        reports[name] = shown(trainer, make())
    theirs = pl.Trainer(max_epochs=1, accelerator="cpu", strategy="ddp", devices=world, **dict.fromkeys(quiet, False))
    reports["lightning"] = shown(theirs, loaders["loader"]())
    (folder / f"rank-{rank}.json").write_text(json.dumps(reports))


def shown(trainer: pl.Trainer, data: DataLoader) -> dict[str, list[int]]:
    module = Shown()
    trainer.fit(module, data)
    trainer.test(module, DataLoader(samples(8), 2), verbose=False)
    trainer.predict(module, DataLoader(samples(8), 2))
    return module.shown
