"""What a rank does in the tests of preferences: train whole, and crashed and resumed.

KTO asks all ranks in every step, and measures against kept log-probabilities; DPO against the base of an adapter.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import adapted
import preferred
from toy import Exploded

from shoestring.recipes import Recipe
from shoestring.trainer import fit, plan

LOSSES = ("kto", "dpo")


def main(folder: Path) -> None:
    for loss in LOSSES:
        given = recipe(folder, loss, "zero2", 2)
        fit(plan(given), run_dir=folder / f"{loss}-whole")
        with suppress(Exploded):
            fit(plan(given), run_dir=folder / f"{loss}-broken", callbacks=[adapted.Crash(5)])
        fit(plan(given), run_dir=folder / f"{loss}-broken")


def recipe(folder: Path, loss: str, strategy: str, devices: int) -> Recipe:
    return preferred.recipe(
        folder, loss, adapter=loss == "dpo", strategy={"name": strategy, "devices": devices}, budget={"steps": 7},
        data={"batch_size": 8, "micro_batch_size": 2 if devices > 1 else 8}, checkpoint={"every": "3 steps"},
        optimizer={"lr": 1e-3},
    )  # fmt: skip
