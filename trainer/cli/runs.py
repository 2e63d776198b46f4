"""The commands that read the ledger, and the one that makes it anew."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, print_json

_KINDS = ("claims", "estimates", "measurements", "verdicts", "events")


def list_runs(as_json: AsJson = False, limit: Annotated[int, typer.Option(help="At most this many.")] = 50) -> None:
    """Every run in the ledger, newest first."""
    from ..ledger import Ledger

    ledger = Ledger()
    ledger.refresh()
    rows = ledger.runs(limit=limit)
    if as_json:
        print_json([asdict(run) for run in rows])
    else:
        from .display import show_runs

        show_runs(rows)


def show(run: Annotated[str, typer.Argument(help="Id, start of an id, or name.")], as_json: AsJson = False) -> None:
    """One run: totals, claims, estimates, measurements and verdict."""
    from ..ledger import Ledger

    ledger = Ledger()
    ledger.refresh()
    record = ledger.run(run)
    kinds = {kind: [row.fields for row in getattr(ledger, kind)(record.id)] for kind in _KINDS}
    if as_json:
        print_json({**asdict(record), **kinds})
        return
    from .display import show_fields

    show_fields(asdict(record))
    for kind, rows in kinds.items():
        for fields in rows:
            show_fields({kind[:-1]: fields})


def rebuild(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="[DIR]...", help="Runs, or folders of runs.")] = None,
) -> None:
    """Make the ledger anew from the runs' own journals: those it knows, and those in DIR (default: runs)."""
    from ..ledger import Ledger

    ledger = Ledger()
    indexed = ledger.rebuild(folders or [Path("runs")])
    typer.echo(f"{len(indexed)} runs are in {ledger.path}")
