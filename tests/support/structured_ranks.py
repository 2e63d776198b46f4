"""Structured pruning's other ways, and what it does together with techniques that keep state, on every rank."""

import json
import logging
import traceback
import warnings
from pathlib import Path

import train_script
from ranks import Group

from shoestring.callbacks import GradualPruning, StructuredPruning, WeightAveraging

CASES = {
    # the last cut follows a checkpoint and a validation, and comes before the crash; the first one before both
    "taylor": lambda: [StructuredPruning(importance="taylor", at=["2 steps", "4 steps"], round_to=2)],
    "lasso": lambda: [StructuredPruning(importance="lasso", at="6 steps", strength=0.5, round_to=4)],
    "averaged": lambda: [StructuredPruning.example(), WeightAveraging(decay=0.8)],
    "masked": lambda: [StructuredPruning.example(), GradualPruning(sparsity=0.5, start="0%", end="70%", every=2)],
}


def main(strategy: str, folder: Path) -> None:
    """All cases without dropout, so that the uninterrupted runs are those of one device too."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    group, results = Group(strategy, folder), {}
    for case, techniques in CASES.items():
        try:
            results[case] = group.resume(case, techniques, dropout=0.0)
        except Exception:
            results[case] = {"error": traceback.format_exc()}
        (folder / f"rank-{group.rank}.json").write_text(json.dumps(results))


def attempt(folder: Path, strategy: str, devices: int, mishap: dict | None = None) -> None:
    """The example's run, or what is left of it."""
    techniques, mishaps = (StructuredPruning.example(),), (mishap,) if mishap else ()
    train_script.train(folder, strategy=strategy, devices=devices, techniques=techniques, mishaps=mishaps, workers=0)


def go_on(folders: list[Path], strategy: str, devices: int) -> None:
    """One run after another in one process group."""
    for folder in folders:
        attempt(folder, strategy, devices)
