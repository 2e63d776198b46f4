"""A user's own code, named `module:attr` in a recipe and imported from the folder the command runs in."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from typing import Any

from . import ShoestringError

# also for pydantic, whose engine takes no functions in place of a pattern
CODE = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"


class CannotImport(ShoestringError):
    """There is no such module, or nothing of that name in it."""


def is_code(name: str | None) -> bool:
    """Whether a recipe value names code: `module:attr`, both dotted Python names."""
    return re.fullmatch(CODE, name or "") is not None


def import_code(name: str) -> Any:
    """Import what `module:attr` names. The caller must have the user's leave (`--allow-code`): importing runs code.

    Raises:
        CannotImport: There is no such module, or nothing of that name in it.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise CannotImport(f"cannot import {name!r} from {here}: {error}") from error
    return target
