"""The measured models of the ledger that no other beats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .metrics import pareto_front
from .trained import CannotExport

LOWER_IS_BETTER = ("loss", "perplexity")


def front(rows: Iterable[tuple[str, Mapping[str, Any]]], x: str, y: str) -> list[dict[str, Any]]:
    """The rows (run id, fields) on the front of cost `x` (less is better) and quality `y` (more, but for losses).

    Of several rows of one model in one backend the last counts. Rows are only comparable on the same data: of rows
    judged by several runs' data, each has its recipe's; the table shows which.
    """
    newest = {(run, str(fields.get("model")), fields.get("backend")): dict(fields, run=run) for run, fields in rows}
    sign = -1 if y in LOWER_IS_BETTER else 1
    known = [row for row in newest.values() if _is_number(row.get(x)) and _is_number(row.get(y))]
    if newest and not known:
        numbers = sorted({k for row in newest.values() for k, v in row.items() if _is_number(v)})
        raise CannotExport(f"no measured model has both {x} and {y}; there are {', '.join(numbers)}.")
    chosen = pareto_front([(row[x], sign * row[y]) for row in known])
    return [known[index] for index in chosen]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
