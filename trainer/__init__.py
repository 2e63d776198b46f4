"""The one package that knows the others: plan a recipe, fit it, and account for it.

Names are loaded on first use, so that light commands stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Trainer": ".trainer", "Budget": "..callbacks.accounting.budget", "Ledger": ".ledger", "plan": ".planning.planner",
    "fit": ".run", "Plan": ".planning.planner", "Report": ".run",
}  # fmt: skip

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
