"""Which checkpoints stay, and what is deleted of the others and of those that were never whole."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from .format import steps

_PRUNED = ".pruned-"


def prune(root: Path, keep: int, newest: int) -> None:
    """Keep `keep` checkpoints up to the one of step `newest`. Later ones were passed over: they are put aside.

    The others are checkpoints no more; `delete_pruned` gives their room back, which takes as long as they are large.
    """
    saved = steps(root)
    for step in [step for step in saved if step <= newest][: -max(1, keep)]:
        with suppress(OSError):
            (root / f"{step:09d}").rename(root / f"{_PRUNED}{step:09d}")
    for step in saved:
        if step > newest:
            passed_over = root / f"{step:09d}.passed-over"
            shutil.rmtree(passed_over, ignore_errors=True)
            (root / f"{step:09d}").rename(passed_over)


def delete_pruned(root: Path) -> None:
    """Delete what `prune` took out. It may be called by several at once."""
    for pruned in root.glob(f"{_PRUNED}*"):
        shutil.rmtree(pruned, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Remove directories that a killed writer left unfinished, and those that it had not deleted to the end."""
    delete_pruned(root)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
