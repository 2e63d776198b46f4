"""A training on several ranks, of which one may be slow: for tests of straggler detection.

All ranks sleep a little in every forward pass and for every sample, so that who is slow does not depend on what else
the machine does.
"""

import time
from pathlib import Path

from torch.utils.data import DataLoader
from toy import ACCUMULATE, Toy, Words, toy

from shoestring.trainer import Trainer
from shoestring.trainer.monitor.stragglers import Stragglers

USUAL = 0.015  # seconds of a forward pass, and of reading a micro-batch


class Sleeper(Toy):
    """A forward pass of USUAL seconds, on one rank and in some steps more."""

    slow_rank, more, steps = -1, 0.0, range(0)

    def training_step(self, batch: dict, batch_idx: int):
        slow = self.trainer.global_rank == self.slow_rank and self.trainer.global_step in self.steps
        time.sleep(USUAL + (self.more if slow else 0.0))
        return super().training_step(batch, batch_idx)


class SlowWords(Words):
    """Half of USUAL to read a sample, or whatever `seconds` says."""

    seconds = USUAL / 2

    def __getitem__(self, index: int) -> dict:
        time.sleep(self.seconds)
        return super().__getitem__(index)


def train(folder: Path, world: int, *, computing: tuple = (), reader: int = -1, steps: int = 52,
          strategy: str = "ddp") -> None:  # fmt: skip
    """computing: (rank, more seconds, steps) of a slow forward pass; reader: the rank that is slow to read."""
    words = SlowWords(144)
    trainer = Trainer(
        strategy=strategy, devices=world, run_dir=folder / "run", ledger=False, accelerator="cpu", max_steps=steps,
        checkpoint_every=None, max_epochs=-1, accumulate_grad_batches=ACCUMULATE, limit_val_batches=0,
    )  # fmt: skip
    (watching,) = (callback for callback in trainer.callbacks if isinstance(callback, Stragglers))
    watching.every = 0.1  # the least number of steps
    if trainer.global_rank == reader:
        words.seconds = 3 * USUAL
    model = toy(dropout=0.0)
    model.__class__ = Sleeper
    if computing:
        Sleeper.slow_rank, Sleeper.more, Sleeper.steps = computing
    trainer.fit(model, DataLoader(words, batch_size=2, shuffle=True))
    assert watching._hook is None, "the module is let go"
    assert trainer.monitor.each_step is None
