"""A user's own script: a foreign LightningModule, a plain shuffling DataLoader with workers, our Trainer.

    train_script.py FOLDER --strategy ddp --devices 2 --mishaps '[{"step": 3, "ranks": [1], "signal": "SIGTERM"}]'

Mishaps happen once each, in the middle of step `step` (or of the validation after it): a file remembers them, so the
same command given again goes on from what the last one left.
"""

import argparse
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
from toy import ACCUMULATE, STEPS, Explode, Exploded, held_out, loader, toy

from shoestring.callbacks.catalog.registry import technique_class
from shoestring.trainer import Trainer

EVERY = 3  # steps between checkpoints


def say(line: str) -> None:
    """In one write, so that what two ranks say does not mingle."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


class Mishaps(pl.Callback):
    """Signals that this process sends to itself."""

    def __init__(self, folder: Path, planned: list[dict]) -> None:
        self.folder, self.planned = folder, planned

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._happen("step", trainer, batch_idx % trainer.accumulate_grad_batches)

    def on_validation_batch_end(self, trainer, pl_module, *args, **kwargs) -> None:
        if not trainer.sanity_checking:
            self._happen("validation", trainer, 0)

    def _happen(self, during: str, trainer, part: int) -> None:
        for number, mishap in enumerate(self.planned):
            here = trainer.global_rank in mishap["ranks"] and during == mishap.get("during", "step")
            if here and trainer.global_step == mishap["step"] and part == mishap.get("part", 0):
                try:
                    (self.folder / f"mishap-{number}-{trainer.global_rank}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                say(f"rank {trainer.global_rank} at step {trainer.global_step}: {mishap['signal']}")
                os.kill(os.getpid(), getattr(signal, mishap["signal"]))


class Samples(pl.Callback):
    """Writes down which samples every step has seen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step - ((batch_idx + 1) % trainer.accumulate_grad_batches == 0)
        with self.path.with_suffix(f".{trainer.global_rank}").open("a") as file:
            file.write(json.dumps([step, batch["index"].tolist()]) + "\n")


def train(
    folder: Path, *, strategy: str, devices: int, techniques: tuple = (), mishaps: tuple = (), callbacks: tuple = (),
    workers: int = 2, dropout: float = 0.1, **options: object,
) -> Trainer:  # fmt: skip
    """One training in `folder`/run."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        techniques=techniques, strategy=strategy, devices=devices, run_dir=folder / "run", ledger=False,
        accelerator="cpu", checkpoint_every=f"{EVERY} steps", max_steps=STEPS, max_epochs=-1,
        accumulate_grad_batches=ACCUMULATE, val_check_interval=8,
        callbacks=[Mishaps(folder, list(mishaps)), *callbacks], **options,
    )  # fmt: skip
    trainer.fit(toy(dropout=dropout), loader(max(2, devices), num_workers=workers), held_out())
    return trainer


def kill_and_compare(folder: Path, strategy: str, devices: int, names: tuple[str, ...], mishap: dict) -> None:
    """The run that is killed the first time, and then the same run without a mishap."""
    for run, mishaps in (("broken", (mishap,)), ("whole", ())):
        techniques = tuple(technique_class(name).example() for name in names)
        workers = 2 if devices < 3 else 0  # processes are what many ranks have enough of
        train(folder / run, strategy=strategy, devices=devices, techniques=techniques, mishaps=mishaps, workers=workers)


def stretch(folder: Path, number: int, strategy: str, devices: int, crash: int | None) -> None:
    """A part of a run, ended by a crash after step `crash`; which samples it saw is in samples-<number>.<rank>."""
    techniques = tuple(technique_class(name).example() for name in ("gradual_pruning", "weight_averaging"))
    folder.mkdir(parents=True, exist_ok=True)
    callbacks = (Samples(folder / f"samples-{number}"), *((Explode(crash),) if crash else ()))
    options = {"techniques": techniques, "callbacks": callbacks, "workers": 0, "dropout": 0.0}
    try:
        train(folder, strategy=strategy, devices=devices, **options)
    except Exploded:
        assert crash


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--techniques", nargs="*", default=[])
    parser.add_argument("--mishaps", type=json.loads, default=[])
    given = parser.parse_args()
    chosen = [technique_class(name).example() for name in given.techniques]
    strategy_options = {"strategy": given.strategy, "devices": given.devices}
    try:
        train(given.folder / "broken", techniques=tuple(chosen), mishaps=tuple(given.mishaps), **strategy_options)
    except SystemExit as ended:
        say(f"rank {os.environ['LOCAL_RANK']} ends with {ended.code}")
        raise
    again = [technique_class(name).example() for name in given.techniques]
    train(given.folder / "whole", techniques=tuple(again), **strategy_options)
    sys.exit(0)
