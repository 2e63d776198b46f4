"""A user's own task that records which samples every step has seen and how large their losses were, rank by rank.

For recipes: `model.task: recorded_samples:Recorded`, `data.source: recorded_samples:data`, launched from this folder.
"""

import json
import os
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

SAMPLES = 200


class Points(Dataset):
    """SAMPLES points on a plane, and what is to be learned of them."""

    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(1))
        self.y = (self.x**2).sum(1, keepdim=True)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "y": self.y[index], "index": torch.tensor(index)}


def data() -> tuple:
    return Points(), None


class Recorded(pl.LightningModule):
    """Writes [step, [samples], [their losses]] to `RECORDS`/<number of ranks>-<rank>-<process>.jsonl."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        losses = (self.net(batch["x"]) - batch["y"]).square().mean(1)
        name = f"{self.trainer.world_size}-{self.global_rank}-{os.getpid()}.jsonl"
        with (Path(os.environ["RECORDS"]) / name).open("a") as file:
            row = [self.trainer.global_step, batch["index"].tolist(), losses.tolist()]
            file.write(json.dumps(row) + "\n")
        time.sleep(0.02)  # long enough to be interrupted
        return losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
