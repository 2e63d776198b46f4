"""A user's own code, named `module:attr` in a recipe and imported from the folder the command runs in."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from .errors import TaskError


def is_code(name: str | None) -> bool:
    """Whether a recipe value names code: `module:attr`, both dotted Python names."""
    module, colon, attribute = (name or "").partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def call_code(name: str, args: dict[str, Any] | None, where: str) -> Any:
    """Import `module:attr` and call it with keyword arguments.

    where: the recipe key, for errors. The caller must have the user's leave (`--allow-code`): importing runs code.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise TaskError(f"{where}: cannot import {name!r} from {here}: {error}") from error
    try:
        inspect.signature(target).bind(**(args or {}))
    except TypeError as error:
        raise TaskError(f"{where}: {name} does not take the args {sorted(args or {})}: {error}") from error
    return target(**(args or {}))
