"""Runs under several budgets, one after another, in a process that plays one rank of a group."""

import json
import os
import warnings
from pathlib import Path

import torch
from small import Small, loader, rate, train
from torch.utils.data import DataLoader, Dataset

from shoestring.callbacks import SequenceLengthWarmup
from shoestring.trainer import Budget


class Sentences(Dataset):
    """{"input_ids": [16]}, 256 of them."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": torch.arange(16) + index}


# name -> (budget, technique or None, seconds a step takes)
CASES = {
    "tokens": (Budget(tokens=1400), False, 0.0),  # 2 ranks x 2 samples x 16 = 64 a step
    "samples": (Budget(samples=50), False, 0.0),
    "growing": (Budget(tokens=3000), True, 0.0),
    "seconds": (Budget(hours=1.2 / 3600), False, 0.03),
    "dollars": (Budget(usd=2.4), False, 0.03),
}


def fit_all(folder: Path) -> None:
    """Fit every case on this rank's share; what each came to goes to `folder`/rank-N.json."""
    warnings.simplefilter("ignore")
    reports = {}
    for name, (budget, grows, pause) in CASES.items():
        trainer = train(
            folder / name, budget, module=Small(pause), data=DataLoader(Sentences(), 2, shuffle=True),
            validation=loader(8, shuffle=False), strategy="ddp", devices=2, usd_per_device_hour=3600.0,
            techniques=[SequenceLengthWarmup(start=8, until="60%", multiple=1)] if grows else [],
        )  # fmt: skip
        reports[name] = {
            **trainer.summary, "horizons": trainer.monitor.account.clock.horizons, "rate": rate(trainer),
            "reserve": trainer.monitor.account.horizon.guard.reserve_seconds,
        }  # fmt: skip
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(reports))
