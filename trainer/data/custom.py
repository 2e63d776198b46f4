"""Calling a user's own code with the arguments of a recipe."""

from __future__ import annotations

import inspect
from typing import Any

from ...own_code import CannotImport, import_code
from .errors import TaskError


def call_code(name: str, args: dict[str, Any] | None, where: str) -> Any:
    """Import `module:attr` and call it with keyword arguments.

    where: the recipe key, for errors. The caller must have the user's leave (`--allow-code`): importing runs code.
    """
    try:
        target = import_code(name)
    except CannotImport as error:
        raise TaskError(f"{where}: {error}") from error
    try:
        inspect.signature(target).bind(**(args or {}))
    except TypeError as error:
        raise TaskError(f"{where}: {name} does not take the args {sorted(args or {})}: {error}") from error
    return target(**(args or {}))
