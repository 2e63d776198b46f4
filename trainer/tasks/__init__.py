"""Tasks: from a recipe to a LightningModule and its data.

`build_task(recipe, workdir=...)` is the entry; the names below load torch only when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import Task, TaskData, build_task

__all__ = ["Task", "TaskData", "build_task"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
