"""Faults, the places of a training where they strike, and the rank that they strike.

A place is passed many times; a fault strikes at the `count`-th. Places are Lightning's hooks, and every act on a file
of the run: Python's audit events tell of those, so that a kill falls between any two of them.
"""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl

SIGNALS = ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT")
# place -> how often it is passed, about
PLACES = {
    "setup": 1,
    "configure_optimizers": 1,
    "fit start": 1,
    "sanity check": 2,
    "train start": 1,
    "batch": 24,
    "backward": 24,
    "optimizer step": 12,
    "batch end": 24,
    "validation": 8,
    "train end": 1,
    "file": 160,
    "after fit": 1,
}
# files beside the run: what fills the disk; that a step has begun; that a fault has struck
FILLER, TRAINS, STRUCK = "filler", "trains", "struck"


@dataclass(frozen=True)
class Fault:
    """What happens to which ranks, and where.

    what: a signal; "pause": stopped for a second; "full disk": no byte is left from there to the attempt's end.
    also: a signal that follows at the next place; None for none.
    """

    what: str
    place: str
    count: int
    ranks: tuple[int, ...]
    also: str | None = None


def draw_fault(draw: random.Random, world: int) -> Fault:
    place = draw.choice(list(PLACES))
    some = draw.choice([(draw.randrange(world),), tuple(range(world))])
    what = draw.choice([*SIGNALS, "pause", "full disk"])
    also = draw.choice([None, "SIGTERM"]) if what == "full disk" else None
    return Fault(what, place, draw.randrange(PLACES[place]), some, also)


class Places(pl.Callback):
    """Strikes this rank with a fault where it is to."""

    def __init__(self, fault: Fault | None, folder: Path) -> None:
        self.fault, self.folder = fault, folder
        self.passed: Counter[str] = Counter()
        self._next: str | None = None
        self.here = self.trains = False

    def watch(self, rank: int) -> None:
        """Of files too, from now on."""
        self.here = self.fault is not None and rank in self.fault.ranks
        if self.here and self.fault.place == "file":
            sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            path = arguments[0]
            if isinstance(path, str | os.PathLike) and str(path).startswith(str(self.folder / "run")):
                self.at("file")

    def at(self, place: str) -> None:
        if not self.here:
            return
        if self._next is not None:
            number, self._next = self._next, None
            self._signal(number)
        struck = place == self.fault.place and self.passed[place] == self.fault.count
        self.passed[place] += 1
        if struck:
            self._strike(self.fault)

    def _strike(self, fault: Fault) -> None:
        print(f"-- {fault}", flush=True)
        (self.folder / STRUCK).touch()
        if fault.what == "pause":
            subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.what == "full disk":
            fill(self.folder)
            self._next = fault.also
        else:
            self._signal(fault.what)

    def _signal(self, name: str) -> None:
        os.kill(os.getpid(), getattr(signal, name))

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer, pl_module, stage) -> None:
        self.at("setup")

    def on_fit_start(self, trainer, pl_module) -> None:
        self.at("fit start")

    def on_train_start(self, trainer, pl_module) -> None:
        self.at("train start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.trains:
            self.trains = True
            (self.folder / TRAINS).touch()
        self.at("batch")

    def on_after_backward(self, trainer, pl_module) -> None:
        self.at("backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.at("optimizer step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.at("batch end")

    def on_validation_batch_end(self, trainer, pl_module, *args, **kwargs) -> None:
        self.at("sanity check" if trainer.sanity_checking else "validation")

    def on_train_end(self, trainer, pl_module) -> None:
        self.at("train end")


def fill(folder: Path) -> None:
    """Leave no byte on the disk of `folder`."""
    with (folder / FILLER).open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                pass


# -- damage between two attempts ------------------------------------------------------------------------------------
def _newest(run: Path) -> Path | None:
    """The newest checkpoint, where an older one is there to fall back to."""
    steps = sorted((run / "checkpoints").glob("0*"))
    return steps[-1] if len(steps) > 1 else None


def _file_of_newest(run: Path, draw: random.Random) -> Path | None:
    newest = _newest(run)
    return draw.choice(sorted(newest.iterdir())) if newest else None


def _flip(run: Path, draw: random.Random) -> bool:
    if path := _file_of_newest(run, draw):
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return path is not None


def _cut(run: Path, draw: random.Random) -> bool:
    if path := _file_of_newest(run, draw):
        os.truncate(path, draw.randrange(path.stat().st_size))
    return path is not None


def _lose(run: Path, draw: random.Random) -> bool:
    if path := _file_of_newest(run, draw):
        path.unlink()
    return path is not None


def _stray(run: Path, draw: random.Random) -> bool:
    if newest := _newest(run):
        name = draw.choice(["tensors-00007.safetensors", "rank-00007.pt", ".nfs0001", "copy of state.pt"])
        (newest / name).write_bytes(draw.randbytes(64))
    return newest is not None


def _tear_journal(run: Path, draw: random.Random) -> bool:
    newest = sorted((run / "events").glob("*.jsonl"))[-1:]
    for path in newest:
        os.truncate(path, max(0, path.stat().st_size - draw.randrange(1, 60)))
    return bool(newest)


def _break_description(run: Path, draw: random.Random) -> bool:
    if there := (path := run / "run.json").exists():
        os.truncate(path, draw.randrange(max(1, path.stat().st_size)))
    return there


# each says whether there was something to damage
DAMAGES: dict[str, Callable[[Path, random.Random], bool]] = {
    "flipped bit": _flip,
    "cut file": _cut,
    "lost file": _lose,
    "stray file": _stray,
    "torn journal": _tear_journal,
    "broken run.json": _break_description,
}


def kinds() -> Iterable[str]:
    return [*SIGNALS, "pause", "full disk", "full disk, SIGTERM", *DAMAGES]
