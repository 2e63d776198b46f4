"""Tasks: from a recipe to a LightningModule and its data.

`build_task(recipe, workdir=...)` is the entry; the names below load torch only when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .build import Task as Task
    from .build import TaskData as TaskData
    from .build import build_task as build_task

__all__ = ["Task", "TaskData", "build_task"]

if not TYPE_CHECKING:  # checkers would accept any name

    def __getattr__(name: str) -> object:
        if name in __all__:
            from . import build

            return getattr(build, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
