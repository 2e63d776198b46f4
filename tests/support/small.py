"""The smallest run there is: a linear layer on 64 random samples, with steps that last as long as a test needs."""

import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from shoestring.trainer import Budget, Trainer

WIDTH, SAMPLES = 8, 64
# what Lightning says about runs this small
QUIET = (
    "ignore:.*does not have many workers",
    "ignore:You defined a `validation_step` but have no",
    "ignore:.*resuming from a checkpoint that ended before the epoch ended",
    "ignore:.*`isinstance.treespec, LeafSpec.`",
)


class Small(pl.LightningModule):
    """`pause`: seconds a step sleeps, so that its cost is known and hardly any of it is CPU."""

    def __init__(self, pause: float = 0.0, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.pause, self.lr = pause, lr
        self.net = torch.nn.Linear(WIDTH, 1, bias=False)
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        x = batch["input_ids"] if isinstance(batch, dict) else batch[0]
        if not isinstance(batch, dict) and len(batch) > 1:
            self.seen.append(batch[1].tolist())
        return self.net(x.float()[:, :WIDTH]).square().mean()

    def validation_step(self, batch, batch_idx):
        time.sleep(self.pause)
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Crash(pl.Callback):
    """Ends a run where its `batch`-th micro-batch begins, counted from 0 over all epochs."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise RuntimeError("crashed")


def samples(size: int = SAMPLES) -> TensorDataset:
    """(features [8], index) pairs."""
    draw = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(size, WIDTH, generator=draw), torch.arange(size))


def loader(size: int = SAMPLES, batch: int = 4, **options) -> DataLoader:
    return DataLoader(samples(size), batch, **{"shuffle": True, **options})


def train(
    folder: Path,
    budget: Budget | None = None,
    *,
    module: pl.LightningModule | None = None,
    data=None,
    validation=None,
    **options,
) -> Trainer:
    """Fit `module` (default: `Small`) under `budget` with the records in `folder`; the trainer, which took `wall` s."""
    trainer = Trainer(budget, run_dir=folder, **{"ledger": False, "accelerator": "cpu", **options})
    trainer.monitor.totals.peak_flops = 1e9  # not measured: it would take half a second
    began = time.perf_counter()
    trainer.fit(module or Small(), loader() if data is None else data, validation)
    trainer.wall = time.perf_counter() - began
    return trainer


def rate(trainer: pl.Trainer) -> float:
    """The learning rate at the end."""
    return trainer.optimizers[0].param_groups[0]["lr"]
