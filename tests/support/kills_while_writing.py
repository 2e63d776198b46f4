"""Kill -9 while a checkpoint is being written in the background, again and again: what is there is always intact.

    python tests/support/kills_while_writing.py [--kills 200] [--minutes 10] [--seed 0]

A training writes checkpoints of twelve megabytes every other step. It is killed at a random moment after a write has
begun, and the same training is given again. After each kill, what is published must be intact, and no older than what
was published before. Prints what it found, and ends with 1 where it was not so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

EVERY = 2
LONGEST = 60.0  # seconds until a write must have begun
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytorch_lightning", "shoestring.trainer.run.trainer", "safetensors.torch"])


class Wide(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(run_dir: Path, home: Path) -> None:
    """A training that goes on until it is killed; its steps are as long as writing is."""
    import logging
    import warnings

    os.environ["SHOESTRING_HOME"] = str(home)
    os.dup2(os.open(run_dir.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    from shoestring.trainer import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(
        run_dir=run_dir, ledger=False, accelerator="cpu", checkpoint_every=f"{EVERY} steps", keep_checkpoints=2,
        max_steps=1_000_000, max_epochs=-1, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Wide(), DataLoader(TensorDataset(torch.randn(256, 512)), batch_size=4))


@dataclass
class Found:
    """What kills have left: how often the checkpoint under way was there, and what is wrong."""

    left: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def kill(folder: Path, draw: random.Random, kills: Found) -> None:
    """One attempt, killed while it writes."""
    from shoestring.trainer.checkpoint import format as checkpoint
    from shoestring.trainer.checkpoint import state

    run_dir, root = folder / "run", folder / "run" / "checkpoints"
    process = _context.Process(target=train, args=(run_dir, folder / "home"))
    process.start()
    begins, wanted, end = 0, draw.randrange(1, 6), monotonic() + LONGEST
    under_way, seen = None, None
    try:
        while begins < wanted and monotonic() < end and process.is_alive():
            writing = next(iter(root.glob(".writing-*")), None)
            if writing is not None and writing.name != seen:
                seen, begins = writing.name, begins + 1
            sleep(0.0005)
        before = max(checkpoint.steps(root), default=None)
        under_way = int(seen.rpartition("-")[2]) if seen else None
        sleep(draw.random() * 0.06)
    finally:
        process.kill()
        process.join()
    if begins < wanted or under_way is None:
        kills.wrong.append(f"no write began: {(folder / 'log').read_text()[-2000:]}")
        return
    interrupted = any(root.glob(".writing-*"))
    published = checkpoint.complete_interrupted(root)
    newest, problems = checkpoint.newest_intact(root, state.check)
    step = int(newest.name) if newest else -1
    kills.left["while writing" if interrupted else "between writes"] += 1
    if published is not None:
        kills.left["whole, not yet published"] += 1
    if problems or step < (before if before is not None else 0):
        kills.wrong.append(f"{before} was there and {under_way} under way, and now {step}: {problems}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, kills, end = random.Random(given.seed), Found(), monotonic() + 60 * given.minutes
    done = 0
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        (Path(name) / "run").mkdir()
        while done < given.kills and monotonic() < end:
            kill(Path(name), draw, kills)
            done += 1
    print(f"{done} kills: {dict(kills.left)}, {len(kills.wrong)} not good")
    print("\n".join(kills.wrong))
    sys.exit(1 if kills.wrong or not done else 0)


if __name__ == "__main__":
    main()
