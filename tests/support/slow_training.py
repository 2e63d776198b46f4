"""What jobs on test clusters train: copied into the folder that a job runs in, and named there by `slow_training:…`.

The first attempt takes PAUSE seconds a step, so that something can happen to it; rank CRASH fails at its third step.
Every task leaves its environment in the job's folder. None of this changes the weights.
"""

import json
import os
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

FEATURES = 8


class Slow(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 33), torch.nn.Dropout(0.1), torch.nn.Linear(33, 1))
        rank, job_dir = os.environ.get("RANK"), os.environ.get("SHOESTRING_JOB_DIR")
        if job_dir:
            Path(job_dir, f"environment-{rank}.json").write_text(json.dumps(dict(os.environ)))
        first = os.environ.get("SHOESTRING_ATTEMPT") == "0"
        self.pause = float(os.environ.get("PAUSE", 0)) if first else 0.0
        self.crash = os.environ.get("CRASH") == rank

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        if self.crash and self.global_step == 2:
            raise ArithmeticError("these numbers are odd")
        return self.net(batch["x"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Samples(torch.utils.data.Dataset):
    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index]}


def data() -> tuple[Samples, None]:
    return Samples(256), None
