"""Techniques of efficient training, the contract they keep, and the doors they act through.

Read `contract.py` first. Names are loaded on first use, so importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .compose import compose as compose  # light, and its module has the same name: bound here, once
from .registry import TECHNIQUES

_HOMES = {
    "Card": "contract", "Technique": "contract", "Settings": "contract",
    "Unfit": "contract", "Misconfigured": "contract",
    "Budget": "accounting.budget", "Clock": "accounting.clock", "Duration": "accounting.clock",
    "clock_of": "accounting.clock", "Accountant": "accounting.accountant", "Measurement": "accounting.meter",
    "shards_of": "parameters.accessor", "make": "registry",
    **{home.partition(":")[2]: home.partition(":")[0] for home in TECHNIQUES.values()},
}  # fmt: skip

__all__ = ["compose", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
