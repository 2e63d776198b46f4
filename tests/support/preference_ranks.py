"""What a rank does in the tests of preferences: KTO, which asks all ranks in every step, whole, crashed and resumed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import adapted
import preferred
from toy import Exploded

from shoestring.trainer import fit, plan


def main(folder: Path) -> None:
    given = recipe(folder, "zero2", 2)
    fit(plan(given), run_dir=folder / "whole")
    with suppress(Exploded):
        fit(plan(given), run_dir=folder / "broken", callbacks=[adapted.Crash(5)])
    fit(plan(given), run_dir=folder / "broken")


def recipe(folder: Path, strategy: str, devices: int):
    return preferred.recipe(
        folder, "kto", strategy={"name": strategy, "devices": devices}, budget={"steps": 7},
        data={"batch_size": 8, "micro_batch_size": 2 if devices > 1 else 8}, checkpoint={"every": "3 steps"},
        optimizer={"lr": 1e-3},
    )  # fmt: skip
