"""Techniques of efficient training, the contract they keep, and what they act through.

Read `contract.py` first. The public names are the lines of `__init__.pyi`; each is loaded on first use, so importing
this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module

from .catalog.compose import compose as compose  # light, and its module has the same name: bound here, once
from .catalog.registry import HOMES

__all__ = sorted(HOMES)


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(import_module(f".{HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
