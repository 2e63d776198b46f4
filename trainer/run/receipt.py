"""The receipt of a recipe's data, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..machine.quiet import quiet
from ..tasks.build import Receipt, data_receipt

if TYPE_CHECKING:
    from ...recipes import Recipe


def receipt_of(recipe: Recipe, run_dir: Path | None = None) -> Receipt:
    """What a run of the recipe would learn from; what is tokenized for it is kept for the run.

    Raises:
        TaskError: The data cannot be read or trained on.
    """
    quiet()
    return data_receipt(recipe, workdir=run_dir or Path("runs") / recipe.name)
