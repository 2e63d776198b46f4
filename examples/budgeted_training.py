"""A run that ends when its budget ends: `python examples/budgeted_training.py`.

The same module and data as in `plain_lightning.py`, in our `Trainer`. It is a `pl.Trainer`, so everything that you know
still works. What it adds: the budget ends the run, the learning rate is at its floor at that very moment, and the run
directory makes the run resumable. Give the same command again with a larger budget, and it goes on.
"""

import sys
from typing import Any

from plain_lightning import Digits, accuracy, data
from torch.utils.data import DataLoader

from shoestring.callbacks import GradualPruning, WeightAveraging
from shoestring.trainer import Budget, Trainer


def main(run_dir: str = "runs/budgeted", samples: int = 8000) -> dict[str, Any]:
    trainer = Trainer(
        budget=Budget(samples=samples, usd=0.05),  # the limit that is reached first ends the run
        techniques=[GradualPruning(sparsity=0.8), WeightAveraging(decay=0.95)],  # in any order: cards decide
        strategy="single",
        accelerator="cpu",
        usd_per_device_hour=0.05,  # what a device costs; the catalogue knows many
        run_dir=run_dir,  # the run's home: checkpoints, journal, summary
        ledger=False,  # True, the default, lists the run in `shoestring runs list`
    )
    module = Digits()
    trainer.fit(module, DataLoader(data(), batch_size=32, shuffle=True))

    spent = trainer.summary
    print(f"{spent['steps']} steps, {spent['samples']:.0f} samples, {spent['seconds']:.1f} s, ${spent['usd']:.6f}")
    print(f"stopped by {spent['stopped_by']}; {accuracy(module):.1%} of the digits are read right")
    return dict(spent)


if __name__ == "__main__":
    main(*sys.argv[1:2])
