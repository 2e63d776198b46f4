"""What one rank does to show that a second copy of the weights changes nothing: train with it and without, go on."""

import json
import os
import shutil
import warnings
from pathlib import Path
from time import sleep

import optimizer_ranks

from shoestring.callbacks.parameters.zero_shards import Zero3Shards
from shoestring.strategies import Sharding

STEPS, HALF = optimizer_ranks.STEPS, optimizer_ranks.HALF


def keeping_copies(publish):
    """What it would be without a new copy."""

    def published(self) -> None:
        copies = {name: getattr(p, "ds_secondary_tensor", None) for name, p in self.parameters.items()}
        publish(self)
        for name, copy in copies.items():
            self.parameters[name].ds_secondary_tensor = copy

    return published


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")

    def train(run: str, hpz: int, **options) -> dict:
        sharding = Sharding(hpz=hpz)
        return optimizer_ranks.train("zero3", "adamw", folder / run, STEPS, sharding=sharding, **options)

    seen = {"plain": train("plain", 1), "copied": train("copied", 2, checkpoint_every=f"{HALF} steps")}
    for run in ("again", "stale"):
        if os.environ["RANK"] == "0":  # as a run that was killed after its half
            ignored = shutil.ignore_patterns(f"{STEPS:09d}", "latest", "final*")
            shutil.copytree(folder / "copied", folder / f"{run}-copy", ignore=ignored)
            (folder / f"{run}-copy").rename(folder / run)
        while not (folder / run).exists():
            sleep(0.01)
    seen["again"] = train("again", 2)
    Zero3Shards.publish = keeping_copies(Zero3Shards.publish)
    seen["stale"] = train("stale", 2)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
