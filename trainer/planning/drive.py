"""Whether a recipe's `strategy.nvme` can take the optimizer state of its run."""

from __future__ import annotations

from pathlib import Path

from ...recipes import Recipe, RecipeError
from ..machine.nvme import problem
from ..tasks.optimizers.cards import OPTIMIZERS, OptimizerCard
from .fitting import Fit, gib
from .strategy import Choice


def drive(recipe: Recipe, optimizer: OptimizerCard, fit: Fit) -> Choice:
    """What the drive is to hold. Looks at the folder where the plan is for this machine.

    Raises:
        RecipeError: The optimizer's states cannot lie on a drive, or not in this folder: it is in memory, on another
            machine, closed, or without so much free space.
    """
    folder, name = recipe.strategy.nvme, recipe.optimizer.name
    assert folder is not None
    if not optimizer.on_drive:
        able = " | ".join(each for each, card in OPTIMIZERS.items() if card.on_drive)
        hint = "DeepSpeed keeps no other states on a drive: leave strategy.nvme out, and they are in host memory"
        raise RecipeError([recipe.problem("optimizer.name", name, f"{able} with strategy.nvme", hint)])
    needed = fit.memory.drive
    if fit.target.here and (fault := problem(Path(folder), needed)) is not None:
        rule = f"a folder on a local drive with {gib(needed)} free"
        raise RecipeError([recipe.problem("strategy.nvme", folder, rule, fault)])
    return Choice("drive", folder, f"masters, gradients, states and a copy of them: {gib(needed)} a node")
