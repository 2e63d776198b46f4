"""The ledger: what every run did and cost, kept in three layers.

- `Journal` (one per run): append-only lines, the record of truth.
- `Ledger` (one per user): an SQLite index over all runs, rebuilt from journals whenever you like.
- `WandbSink`: a mirror on Weights & Biases that can be lost without losing anything.

Layout of a run directory: `run.json` (`RunIdentity`), `events/` (the journal), `summary.json` (totals at the end).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .identity import IdentityError as IdentityError
    from .identity import RunIdentity as RunIdentity
    from .identity import read_summary as read_summary
    from .identity import write_summary as write_summary
    from .journal import Journal as Journal
    from .journal import JournalError as JournalError
    from .journal import JournalProblem as JournalProblem
    from .journal import Row as Row
    from .journal import next_attempt as next_attempt
    from .journal import read as read
    from .lock import RunBusy as RunBusy
    from .runs import RunRow as RunRow
    from .store import Ledger as Ledger
    from .store import LedgerError as LedgerError
    from .wandb_replay import replay as replay
    from .wandb_sink import WandbSink as WandbSink

_HOMES = {
    "RunIdentity": "identity", "IdentityError": "identity", "read_summary": "identity", "write_summary": "identity",
    "Journal": "journal", "JournalError": "journal", "JournalProblem": "journal", "Row": "journal", "read": "journal",
    "next_attempt": "journal", "RunBusy": "lock", "RunRow": "runs", "Ledger": "store", "LedgerError": "store",
    "WandbSink": "wandb_sink", "replay": "wandb_replay",
}  # fmt: skip
__all__ = sorted(_HOMES)

if not TYPE_CHECKING:  # checkers would accept any name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
