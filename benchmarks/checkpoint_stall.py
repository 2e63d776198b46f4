"""How long training stands still for a checkpoint: written before it goes on, and written in the background.

    python benchmarks/checkpoint_stall.py [--million 50] [--saves 6] [--write]

One run of AdamW, whose saves alternate between the two; also the mean step with and without a write beside it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch
from report import arguments, measured, page, publish, table, wrapped
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.trainer import Trainer

WIDTH = 1024


class Wide(pl.LightningModule):
    def __init__(self, million: int) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(round(million * 1e6 / WIDTH**2))]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class Alternate(pl.Callback):
    """Every other time training waits for what is saved."""

    def __init__(self) -> None:
        self.waits = False
        self.stalls: dict[str, list[float]] = {"written first": [], "in the background": []}
        self.steps: dict[str, list[float]] = {"alone": [], "beside a write": []}
        self._began = 0.0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        checkpoints = trainer.monitor.checkpoints
        plain = checkpoints.save

        def save(trainer: Any, module: Any, wait: bool = False) -> None:
            plain(trainer, module, wait or self.waits)

        checkpoints.save = save

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._began = perf_counter()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        beside = trainer.monitor.checkpoints.under_way
        self.steps["beside a write" if beside else "alone"].append(perf_counter() - self._began)


def main() -> None:
    parser = arguments("how long a checkpoint stops a run")
    parser.add_argument("--million", type=int, default=50)
    parser.add_argument("--saves", type=int, default=6)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    alternate = Alternate()
    rows = DataLoader(TensorDataset(torch.randn(4096, WIDTH)), batch_size=8)
    every = 12
    with tempfile.TemporaryDirectory() as folder:
        spent: list[float] = []

        class Saves(pl.Callback):
            """What the checkpoint window has grown by since the last save began."""

            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step % every == every - 1:
                    spent.append(trainer.monitor.account.spending.windows.so_far().get("checkpoint", 0.0))
                    alternate.waits = trainer.global_step // every % 2 == 1

        trainer = Trainer(
            run_dir=Path(folder) / "run", ledger=False, accelerator="cpu", checkpoint_every=f"{every} steps",
            max_steps=every * (given.saves + 1), max_epochs=-1, callbacks=[alternate, Saves()],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Wide(given.million), rows)
    for number, (before, after) in enumerate(pairwise(spent)):
        alternate.stalls["written first" if number % 2 else "in the background"].append(after - before)
    medians = {name: statistics.median(seconds) for name, seconds in (alternate.stalls | alternate.steps).items()}
    ratio = medians["in the background"] / medians["written first"]
    rows = [[name, f"{1e3 * seconds:,.0f}"] for name, seconds in medians.items()]
    about = wrapped(
        f"AdamW on {given.million} million parameters, one device, a checkpoint every {every} steps. The first two "
        f"rows are how long training stands still for a save, medians of {given.saves // 2} each, in turns; the others "
        "are a step without and with a write going on beside it."
    )
    publish(
        page(
            "How long a run stands still for a checkpoint", about, table(["", "ms"], rows),
            f"In the background, a save stops the run for {ratio:.1%} of the time that it takes when training waits.",
            wrapped(measured(f"checkpoint_stall.py {' '.join(sys.argv[1:])}")),
        ), __file__, given.write,
    )  # fmt: skip


if __name__ == "__main__":
    main()
