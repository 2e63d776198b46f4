"""From the rows of one run to the one line that stands for it.

What feeds which column, so that a claim or an estimate can never pass for a measurement:

- Totals (`steps`, `tokens`, `usd`, ...) are the newest value under that name in rank 0's `step` and `event` rows and in
  `measurement` rows with `window="run"`; they are expected to be cumulative over attempts. `peak_bytes` is the largest
  on any rank. `summary.json` adds what the rows do not say, and overrules them unless they counted more steps.
- `status` comes from the `event` field of rank 0's event rows: `start` and `resume` make a run running, `stop`
  finished, `preempted` preempted, `error` failed; within one attempt the worst wins. A running run of this machine
  whose process is gone has failed (`stopped_by` is then `died`). A run without such events is `unknown`.
- `metrics` are the newest numbers of the step rows that are no totals, overlaid by a `metrics` mapping in an event.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby
from math import inf
from typing import Any

from .identity import RunIdentity
from .lines import Row

STATUS = {
    "start": "running", "resume": "running", "stop": "finished", "finish": "finished", "finished": "finished",
    "preempted": "preempted", "error": "failed", "failed": "failed",
}  # fmt: skip
_WORSE = ("unknown", "running", "finished", "preempted", "failed")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in the ledger; None where nothing is known. Seconds, bytes, US dollars, kWh, FLOPs; shares in 0..1.

    `tokens` are those of the data, `padding_share` is what rows are padded with, of all positions, and
    `trained_tokens` are those that carry loss. `seconds` is wall-clock time spent in all attempts, `device_seconds`
    that times the devices. `problems` counts damaged or missing
    journal lines.
    """

    id: str
    name: str
    run_dir: str
    recipe_hash: str = ""
    created: float = 0.0
    status: str = "unknown"
    attempts: int = 0
    steps: int | None = None
    tokens: int | None = None
    padding_share: float | None = None
    trained_tokens: int | None = None
    samples: int | None = None
    seconds: float | None = None
    device_seconds: float | None = None
    usd: float | None = None
    usd_per_million_trained_tokens: float | None = None
    kwh: float | None = None
    kwh_source: str | None = None
    flops_counted: float | None = None
    flops_realised: float | None = None
    peak_bytes: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    stopped_by: str | None = None
    hardware: str | None = None
    strategy: str | None = None
    world_size: int | None = None
    techniques: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    problems: int = 0


def _integer(value: Any) -> int | float:
    # SQLite's integers have 64 bits
    return int(value) if abs(value) < 2**63 else float(value)


# the columns that rows fill, with what makes a value fit for them
_FIT: Mapping[str, Any] = {
    **dict.fromkeys(("steps", "tokens", "trained_tokens", "samples", "peak_bytes", "world_size"), _integer),
    **dict.fromkeys(("seconds", "device_seconds", "usd", "kwh", "flops_counted", "flops_realised"), float),
    **dict.fromkeys(("tokens_per_second", "mfu", "padding_share", "usd_per_million_trained_tokens"), float),
    **dict.fromkeys(("kwh_source", "stopped_by", "hardware", "strategy"), str),
    "techniques": lambda value: [value] if isinstance(value, str) else list(value),
}
_NO_METRIC = {*_FIT, "step", "epoch", "padding"}


class Summary:
    """Folds the rows of one run, fed in the order of `read`, into a `RunRow`."""

    def __init__(self) -> None:
        self.columns: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.attempts: set[int] = set()
        self.status = "unknown"
        self.hostname = ""
        self._peak = 0.0

    def take(self, row: Row) -> None:
        self.attempts.add(row.attempt)
        if row.kind == "measurement" and row.fields.get("window") != "run":
            return
        if row.kind in ("step", "event", "measurement"):
            self._peak = max(self._peak, _number(row.fields.get("peak_bytes")))
            if row.rank == 0:
                self._fill(row)

    def _fill(self, row: Row) -> None:
        values = row.fields
        if row.kind == "event":
            self._follow(values)
        elif row.kind == "step":
            self.metrics.update((k, v) for k, v in values.items() if k not in _NO_METRIC and isinstance(v, int | float))
        self._merge(values)

    def _follow(self, event: Mapping[str, Any]) -> None:
        status = STATUS.get(str(event.get("event")), "unknown")
        if status == "running":
            self.status = status
            self.columns.pop("stopped_by", None)
            self.hostname = str(event.get("hostname") or self.hostname)
        self.status = max(self.status, status, key=_WORSE.index)

    def _merge(self, values: Mapping[str, Any]) -> None:
        if "step" in values:
            values = {"steps": values["step"], **values}
        self.columns.update(_fitting(values))
        if isinstance(metrics := values.get("metrics"), Mapping):
            self.metrics.update(metrics)

    def result(
        self, identity: RunIdentity, run_dir: str, summary: Mapping[str, Any], *, alive: bool | None, problems: int
    ) -> RunRow:
        """The finished line; `summary` is the content of summary.json, `alive` whether a process holds the run."""
        if _number(summary.get("steps")) >= _number(self.columns.get("steps")):
            self._merge(summary)
        else:
            self.columns = {**_fitting(summary), **self.columns}
        if self._peak:
            self.columns["peak_bytes"] = int(max(self._peak, _number(self.columns.get("peak_bytes"))))
        if self.status == "running":
            self.columns.pop("stopped_by", None)
            if alive is False and (self.hostname or identity.hostname) == socket.gethostname():
                self.status, self.columns["stopped_by"] = "failed", "died"
        return RunRow(
            id=identity.id, name=identity.name, run_dir=run_dir, recipe_hash=identity.recipe_hash,
            created=identity.created, status=self.status, attempts=len(self.attempts), metrics=self.metrics,
            problems=problems, **self.columns,
        )  # fmt: skip


def effective(rows: Iterable[Row]) -> list[Row]:
    """The step rows that count: a step redone by a later attempt replaces what came before it from there on.

    Rows in, and out, ordered by (attempt, seq).
    """
    kept: list[list[Row]] = []
    horizon = inf
    for _, group in reversed([(attempt, list(group)) for attempt, group in groupby(rows, lambda row: row.attempt)]):
        kept.append([row for row in group if _number(row.fields.get("step")) < horizon])
        horizon = min([horizon, *(_number(row.fields["step"]) for row in group if "step" in row.fields)])
    return [row for group in reversed(kept) for row in group]


def _fitting(values: Mapping[str, Any]) -> dict[str, Any]:
    values_that_fit = {}
    for name in _FIT.keys() & values.keys():
        try:
            values_that_fit[name] = _FIT[name](values[name]) if values[name] is not None else None
        except (TypeError, ValueError, OverflowError):
            continue
    return {name: value for name, value in values_that_fit.items() if value is not None}


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else -1


COLUMNS = tuple(column.name for column in fields(RunRow))
JSON_COLUMNS = frozenset({"techniques", "metrics"})
