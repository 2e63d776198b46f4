"""What one rank does to verify several recipes, one after another, in one process group."""

from __future__ import annotations

import json
import os
from pathlib import Path

from shoestring.recipes import Recipe
from shoestring.trainer.planning.planner import plan
from shoestring.trainer.run.verify.verify import Runs

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


def main(recipes: dict[str, Recipe], folder: Path, here: Path, only: dict[str, list[str]]) -> None:
    """Write `verdict.json`: by name, what has come of each recipe on several ranks.

    recipes: by name. folder: what all ranks share. here: where relative paths begin. only: variants that are run, by
    recipe; all where there are none.
    """
    os.chdir(here)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    launched = {key: os.environ.pop(key) for key in LAUNCHED}
    runs = {name: Runs(recipe, plan(recipe), 4, print) for name, recipe in recipes.items()}
    for name, run in runs.items():
        run.folder = folder / name
        if rank == 0:  # before there is a process group, in which others would be waited for
            run.begin()
    os.environ.update(launched)
    for name, run in runs.items():
        run.on_ranks(world, only.get(name))
    if rank == 0:
        verdicts = {name: run.verdict().as_dict() for name, run in runs.items()}
        (folder / "verdict.json").write_text(json.dumps(verdicts))
