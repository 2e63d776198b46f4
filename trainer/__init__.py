"""The one package that knows the others: plan a recipe, fit it, and account for it.

Names are loaded on first use, so that light commands stay light. Type checkers read the imports below instead.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..callbacks.accounting.budget import Budget as Budget
    from .ledger import Ledger as Ledger
    from .ledger.report import Report as Report
    from .planning.planner import Plan as Plan
    from .planning.planner import plan as plan
    from .run.fit import fit as fit
    from .run.trainer import Trainer as Trainer

_HOMES = {
    "Trainer": ".run.trainer", "Budget": "..callbacks.accounting.budget", "Ledger": ".ledger", "fit": ".run.fit",
    "plan": ".planning.planner", "Plan": ".planning.planner", "Report": ".ledger.report",
}  # fmt: skip

__all__ = sorted(_HOMES)

if not TYPE_CHECKING:  # checkers would accept any name

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(import_module(_HOMES[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
