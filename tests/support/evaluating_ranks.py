"""Validations that do not divide among ranks, and weights in unusual layouts: short trainings in one process group.

Rank 0 leaves what it saw in `<folder>/seen.json`.
"""

import json
import logging
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from shoestring.trainer import Budget, Trainer
from shoestring.trainer.checkpoint.weights import load_weights


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(count))[:, None])


class Buckets(torch.utils.data.Sampler):
    """Four batches of different lengths: two rounds on three ranks, the second for one of them."""

    def __iter__(self):
        return iter([[4, 5, 6], [0], [2, 3], [1]])

    def __len__(self):
        return 4


class Stream(IterableDataset):
    """Rank r has r + `least` batches of one number, which are r * 10, r * 10 + 1, ..."""

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def __iter__(self):
        rank = int(os.environ["RANK"])
        return iter(torch.arange(rank * 10.0, rank * 10.0 + rank + self.least)[:, None])


class SizedStream(Stream):
    def __len__(self):
        return int(os.environ["RANK"]) + self.least


VALIDATIONS = {
    "own batches": lambda: DataLoader(numbers(7), batch_sampler=Buckets()),
    "one a batch": lambda: DataLoader(numbers(5), batch_size=1),
    "shuffled": lambda: DataLoader(numbers(7), batch_size=2, shuffle=True),
    "fewer than ranks": lambda: DataLoader(numbers(2), batch_size=4),
    "streams": lambda: DataLoader(Stream(), batch_size=1),
    "sized streams": lambda: DataLoader(SizedStream(), batch_size=1),
}


class Meter:
    """What users keep beside their modules."""

    def __init__(self) -> None:
        self.values: list[float] = []


class Counting(pl.LightningModule):
    """Means of its validation numbers, kept in three ways, after a forward that needs all weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
        self.scale = nn.Parameter(torch.ones(1))
        self.meter = Meter()

    def forward(self, x):
        return self.net(x) * self.scale

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - 2 * batch[0]).square().mean()

    def on_validation_epoch_start(self):
        self.sums = torch.zeros(len(VALIDATIONS), 3, device=self.device)
        self.meter.values = [[] for _ in VALIDATIONS]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x = batch[0] if isinstance(batch, list) else batch
        error = (self(x) - 2 * x).square().sum()
        self.sums[dataloader_idx] += torch.stack([x.sum(), error, torch.tensor(float(len(x)))])
        self.meter.values[dataloader_idx] += x.flatten().tolist()
        self.log("mean", x.mean(), batch_size=len(x), sync_dist=True)

    def on_validation_epoch_end(self):
        self.reduced = self.trainer.strategy.reduce(self.sums.clone(), reduce_op="sum").tolist()
        everyone = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everyone, self.meter.values)
        self.values = [sorted(value for rank in everyone for value in rank[i]) for i in range(len(VALIDATIONS))]

    on_test_epoch_start, test_step, on_test_epoch_end = (
        on_validation_epoch_start,
        validation_step,
        on_validation_epoch_end,
    )

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Convolving(pl.LightningModule):
    def __init__(self, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 2))
        self.net[2].requires_grad_(False)
        if last:
            self.net.to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def train(strategy: str, home: Path, module: pl.LightningModule, data, validation=None) -> Path:
    trainer = Trainer(
        Budget(steps=2), strategy=strategy, devices=int(os.environ["WORLD_SIZE"]), run_dir=home, ledger=False,
        accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.monitor.totals.peak_flops = 1e9
    trainer.fit(module, data, validation)
    return home / "final"


def images(batch: int) -> DataLoader:
    draw = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(12, 3, 8, 8, generator=draw), torch.arange(12) % 2), batch_size=batch)


def main(strategy: str, folder: Path, validates: bool) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    train(strategy, folder / "last", Convolving(last=True), images(12 // int(os.environ["WORLD_SIZE"])))
    if not validates:
        return
    module, data = Counting(), DataLoader(numbers(12), batch_size=2, shuffle=True)
    final = train(strategy, folder / "run", module, data, [make() for make in VALIDATIONS.values()])
    reduced, values, mean = module.reduced, module.values, module.trainer.callback_metrics["mean/dataloader_idx_0"]
    if strategy == "ddp":
        for evaluate in (module.trainer.validate, module.trainer.test):
            module.reduced = module.values = None
            evaluate(module, [make() for make in VALIDATIONS.values()], verbose=False)
            assert module.values == values and [s[::2] for s in module.reduced] == [s[::2] for s in reduced]
            assert module.trainer.callback_metrics["mean/dataloader_idx_0"] == mean
    if os.environ["RANK"] != "0":
        return
    kept, seen = Counting(), {}
    kept.load_state_dict(load_weights(final), strict=False)
    kept.eval()
    for index, name in enumerate(VALIDATIONS):
        x = torch.tensor(module.values[index])[:, None]
        with torch.no_grad():
            wanted = float((kept(x) - 2 * x).square().sum())
        seen[name] = {
            "sums": module.reduced[index], "values": module.values[index], "of the kept model": wanted,
            "mean": float(module.trainer.callback_metrics[f"mean/dataloader_idx_{index}"]),
        }  # fmt: skip
    (folder / "seen.json").write_text(json.dumps(seen))


def no_batch(folder: Path) -> None:
    """Rank 0 has none: every rank must be told."""
    warnings.simplefilter("ignore")
    data = DataLoader(numbers(12), batch_size=2)
    try:
        train("ddp", folder / "run", Counting(), data, DataLoader(Stream(least=0), batch_size=1))
    except Exception as error:
        (folder / f"said-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
