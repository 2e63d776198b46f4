"""What our trainer costs a step, beside plain Lightning and a raw loop: same model, same batches, same process.

    python benchmarks/overhead.py [--rounds 7] [--json FILE]

Two figures a step: function calls (Python and C, counted by the interpreter: exact on any machine) and CPU time of the
process, one thread, the median over rounds of A B C A B C … so that a machine's drift hits all alike. Ours has the
meter, journal, ledger, budget and learning-rate schedule on; plain Lightning has no logger, no bar and no checkpoints,
which is its fastest form.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.trainer import Budget, Trainer

WARMUP = 30


class Probe(pl.LightningModule):
    """A model that notes, in its own training step, when the measured stretch begins and ends."""

    def __init__(self, net: nn.Module, steps: int, count: bool, scheduled: bool) -> None:
        super().__init__()
        self.scheduled = scheduled
        self.net, self.steps, self.count = net, steps, count
        self.seen = self.calls = 0
        self.began = self.seconds = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._mark()
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def _mark(self) -> None:
        if self.seen == WARMUP:
            self.began = time.process_time()
            if self.count:
                sys.setprofile(self._profile)
        elif self.seen == WARMUP + self.steps:
            sys.setprofile(None)
            self.seconds = time.process_time() - self.began
        self.seen += 1

    def _profile(self, frame: Any, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            self.calls += 1

    def configure_optimizers(self) -> Any:
        """All three decay the rate linearly, step by step: ours by its clock, the others by torch's scheduler."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        if not self.scheduled:
            return optimizer
        steps = WARMUP + self.steps + 1
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean(1))


def mlp() -> tuple[nn.Module, torch.Tensor]:
    """64-256-256-10: 85,002 parameters."""
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return net, torch.randn(1024, 64)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    """4 layers, d=256, ff=1024: 3.2 M parameters, sequences of 64."""
    return Encoder(), torch.randn(256, 64, 256)


def raw(module: Probe, loader: DataLoader[Any], steps: int) -> None:
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    done = 0
    while done < steps:
        for index, batch in enumerate(loader):
            loss = module.training_step(batch, index)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                return


def plain(module: Probe, loader: DataLoader[Any], steps: int) -> None:
    pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)  # fmt: skip


def ours(module: Probe, loader: DataLoader[Any], steps: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ["SHOESTRING_HOME"] = home
        # a budget in dollars too, so that the guard measures and re-plans
        Trainer(
            Budget(steps=steps, usd=1e6), accelerator="cpu", run_dir=f"{home}/run", usd_per_device_hour=1.0,
            watts_per_device=10.0,
        ).fit(module, loader)  # fmt: skip


VARIANTS: dict[str, Callable[[Probe, DataLoader[Any], int], None]] = {
    "raw": raw,
    "lightning": plain,
    "shoestring": ours,
}


def once(
    make: Callable[[], tuple[nn.Module, torch.Tensor]], run: Callable[..., None], steps: int, count: bool
) -> float:
    """CPU seconds, or function calls, of one step."""
    torch.manual_seed(0)
    net, inputs = make()
    data = TensorDataset(inputs, torch.randint(0, 10, (len(inputs),)))
    module = Probe(net, steps, count, scheduled=run is not ours)
    run(module, DataLoader(data, batch_size=8, shuffle=True), WARMUP + steps + 1)
    return module.calls / steps if count else module.seconds / steps


def measure(make: Callable[[], tuple[nn.Module, torch.Tensor]], steps: int, rounds: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, run in VARIANTS.items():
            times[name].append(once(make, run, steps, count=False))
    return {
        name: {"cpu_us": 1e6 * statistics.median(times[name]), "calls": once(make, run, steps, count=True)}
        for name, run in VARIANTS.items()
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--json", default=None)
    chosen = options.parse_args()
    warnings.filterwarnings("ignore")
    import logging

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = {}
    for title, make, steps in (("MLP, 85 k parameters", mlp, 400), ("transformer, 3.2 M parameters", transformer, 40)):
        rows = results[title] = measure(make, steps, chosen.rounds)
        print(f"{title}: a step, median of {chosen.rounds} rounds of {steps}")
        for name, row in rows.items():
            beside = "  ".join(f"{k} x {row[k] / rows['lightning'][k]:.3f}" for k in ("cpu_us", "calls"))
            print(f"  {name:12} {row['cpu_us']:9.1f} us CPU  {row['calls']:8.1f} calls   beside Lightning: {beside}")
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
