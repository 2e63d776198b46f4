"""The ledger: one SQLite file over all runs. It holds nothing that the runs' own journals do not hold."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from ...directories import home
from ...files import replace_file
from ...spelling import nearest
from . import lock
from .database import TABLES, LedgerBusy, LedgerError, read_connection, write_connection
from .identity import IdentityError, RunIdentity, read_summary
from .journal import LOCK_NAME
from .lines import JournalProblem, Row, read, segments
from .runs import COLUMNS, JSON_COLUMNS, RunRow, Summary, effective

__all__ = ["Ledger", "LedgerError"]


class Ledger:
    """The index of all runs: what each did and what it cost.

    Making one touches no disk; asking one that does not exist gives empty answers and creates nothing. Every call opens
    and closes the file, so one object may be used by several threads, and one file by many processes. Errors:
    `LedgerError` names the file or the run that was asked for.

    Args:
        path: The SQLite file; by default `$SHOESTRING_HOME/ledger.sqlite`.

    Example:
        >>> Ledger(Path("elsewhere/ledger.sqlite")).runs()
        []
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = Path(path) if path is not None else home() / "ledger.sqlite"

    def index(self, run_dir: Path, *, force: bool = False) -> str:
        """Bring one run up to date from its directory and return its id; nothing is written if nothing has changed.

        All rows of the run are replaced in one transaction. `force` does so even if it looks unchanged. A copy of a
        directory whose run is known elsewhere counts as a run of its own, with another id.
        """
        run_dir = Path(run_dir).resolve()
        identity = RunIdentity.load(run_dir)
        with write_connection(self.path) as db:
            identity = _as_copy(db, identity, run_dir)
            # taken inside the transaction and before reading: no older look at the run can overwrite a newer one
            alive = lock.is_held(run_dir / "events" / LOCK_NAME)
            fingerprint = _fingerprint(run_dir, alive)
            known = db.execute("SELECT fingerprint FROM runs WHERE id=?", (identity.id,)).fetchone()
            if force or known != (fingerprint,):
                _forget(db, identity.id)
                _insert(db, run_dir, identity, alive, fingerprint)
        with suppress(OSError):
            (self._notes / identity.id).unlink(missing_ok=True)
        return identity.id

    def announce(self, run_dir: Path) -> None:
        """Leave a note that this run is to be indexed; `refresh` does it, if the run itself never gets to.

        Waits for nobody: a note is a file beside the ledger. A disk that refuses it is no matter.
        """
        with suppress(OSError, IdentityError):
            run_dir = Path(run_dir).resolve()
            replace_file(self._notes / RunIdentity.load(run_dir).id, str(run_dir))

    @property
    def _notes(self) -> Path:
        return self.path.with_name("to-index")

    def _index_announced(self) -> None:
        for note in sorted(self._notes.glob("[0-9a-f]*")):
            with suppress(OSError, IdentityError):  # a run that is gone is no longer announced
                run_dir = Path(note.read_text())
                if (run_dir / "run.json").exists():
                    self.index(run_dir)
            note.unlink(missing_ok=True)

    def refresh(self) -> None:
        """Index every run that was announced, is recorded as running or is yet to start, and is within reach."""
        self._index_announced()
        for run in (*self.runs(status="running"), *self.runs(status="launched")):
            if (Path(run.run_dir) / "run.json").exists():
                self.index(Path(run.run_dir))

    def rebuild(self, dirs: Iterable[Path] = ()) -> list[str]:
        """Make the index anew from the runs in `dirs` and from those it knows and can still reach; their ids.

        Each of `dirs` is a run directory or holds some, up to three levels down. What is found nowhere is forgotten. A
        ledger file that is damaged is put aside as `*.damaged` first.
        """
        try:
            known = [Path(run.run_dir) for run in self.runs()]
        except LedgerBusy:
            raise
        except LedgerError:
            known = []
            self._rename_damaged_file()
        places = {place.resolve() for folder in [*map(Path, dirs), *known] for place in _run_dirs(folder)}
        # of copies that the index does not know, the oldest is the original
        indexed = [self.index(place, force=True) for place in sorted(places, key=_made)]
        for run in self.runs():
            if run.id not in indexed:
                self._forget(run.id)
        return indexed

    def runs(
        self, *, status: str | None = None, name: str | None = None, recipe_hash: str | None = None, limit: int = -1
    ) -> list[RunRow]:
        """Runs, the newest first, only those that match what is given."""
        wanted = {"status": status, "name": name, "recipe_hash": recipe_hash}
        given = {column: value for column, value in wanted.items() if value is not None}
        where = " AND ".join(f"{column}=:{column}" for column in given) or "1"
        query = f"SELECT {', '.join(COLUMNS)} FROM runs WHERE {where} ORDER BY created DESC, id LIMIT :limit"
        with read_connection(self.path) as db:
            return [_run_row(row) for row in db.execute(query, {**given, "limit": limit})] if db else []

    def run(self, wanted: str) -> RunRow:
        """The run with this id, name, run directory, or start of an id; `LedgerError` where several are meant."""
        prefix = wanted.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        ways = (
            ("id=?", wanted, "have this id"), ("name=?", wanted, "are called so"),
            ("run_dir=?", str(Path(wanted).resolve()), "were there"), ("id LIKE ? ESCAPE '\\'", prefix, "begin so"),
        )  # fmt: skip
        with read_connection(self.path) as db:
            for way, value, what in ways if db and wanted else ():
                query = f"SELECT {', '.join(COLUMNS)} FROM runs WHERE {way} ORDER BY created DESC, id"
                if len(same := [_run_row(row) for row in db.execute(query, (value,))]) > 1:  # type: ignore[union-attr]
                    listed = ", ".join(f"{run.id} ({run.run_dir}, {run.status})" for run in same[:8])
                    raise LedgerError(f"{wanted!r}: {len(same)} runs {what}: {listed}. Give an id.")
                if same:
                    return same[0]
            names = [row[0] for row in db.execute("SELECT DISTINCT name FROM runs ORDER BY created DESC")] if db else []
        raise LedgerError(_no_run(wanted, names, self.path))

    def claims(self, run: str) -> list[Row]:
        """Return what the techniques of a run promise."""
        return self._rows("claims", run)

    def estimates(self, run: str) -> list[Row]:
        """Return the estimates of a run's plan."""
        return self._rows("estimates", run)

    def measurements(self, run: str) -> list[Row]:
        """Return the measurements of all ranks."""
        return self._rows("measurements", run)

    def models(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the measurements of the models of all runs, as (run id, fields), oldest first."""
        query = "SELECT run, fields FROM measurements WHERE json_extract(fields, '$.window')='model' ORDER BY t"
        with read_connection(self.path) as db:
            return [(run, json.loads(fields)) for run, fields in db.execute(query)] if db else []

    def verdicts(self, run: str) -> list[Row]:
        """Whether goals were reached and budgets spent."""
        return self._rows("verdicts", run)

    def events(self, run: str) -> list[Row]:
        """Return the events: starts, checkpoints, new plans, preemptions, errors."""
        return self._rows("events", run)

    def steps(self, run: str, *, redone: bool = False) -> list[Row]:
        """Rank 0's step rows in order. Steps that a later attempt did again count once, unless `redone`."""
        rows = self._rows("steps", run)
        return rows if redone else effective(rows)

    def jobs(self) -> list[dict[str, Any]]:
        """Return the records of all jobs from their submission, newest first."""
        with read_connection(self.path) as db:
            if db is None or not db.execute("SELECT 1 FROM sqlite_master WHERE name='jobs'").fetchone():
                return []
            return [json.loads(row[0]) for row in db.execute("SELECT fields FROM jobs ORDER BY submitted DESC, id")]

    def delete(self, run: str, *, files: bool = False) -> RunRow:
        """Forget a run and return what was known of it. Its directory stays, and `index` would bring it back,
        unless `files`: then it is removed too, if it still is that run's."""
        row = self.run(run)
        if files:
            there = RunIdentity.load(Path(row.run_dir)).id
            if row.id not in (there, _copy_id(there, Path(row.run_dir))):
                raise LedgerError(f"{row.run_dir} now belongs to another run than {row.id}; nothing was removed.")
            shutil.rmtree(row.run_dir)
        self._forget(row.id)
        return row

    def _forget(self, run_id: str) -> None:
        with write_connection(self.path) as db:
            _forget(db, run_id)

    def _rows(self, table: str, run: str) -> list[Row]:
        kind = next(kind for kind, name in TABLES.items() if name == table)
        query = f"SELECT rank, attempt, seq, t, mono, fields FROM {table} WHERE run=? ORDER BY rank, attempt, seq"
        identifier = self.run(run).id
        with read_connection(self.path) as db:
            rows = db.execute(query, (identifier,)) if db else []
            return [Row(row[0], row[1], row[2], row[3], row[4], kind, json.loads(row[5])) for row in rows]

    def _rename_damaged_file(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            part = self.path.with_name(self.path.name + suffix)
            if part.is_file():
                part.replace(part.with_name(part.name + ".damaged"))


def _as_copy(db: sqlite3.Connection, identity: RunIdentity, run_dir: Path) -> RunIdentity:
    """The identity, with another id if the ledger knows this run in another directory that still holds it."""
    known = db.execute("SELECT run_dir FROM runs WHERE id=?", (identity.id,)).fetchone()
    if known is None or known[0] == str(run_dir):
        return identity
    try:
        if RunIdentity.load(Path(known[0])).id != identity.id:
            return identity
    except IdentityError:  # it was moved here
        return identity
    return replace(identity, id=_copy_id(identity.id, run_dir))


def _copy_id(run_id: str, run_dir: Path) -> str:
    return hashlib.sha256(f"{run_id} {run_dir.resolve()}".encode()).hexdigest()[:12]


def _made(run_dir: Path) -> tuple[int, Path]:
    """Orders directories by when they came to be: a copy may keep other dates, but not that of its last change."""
    return (run_dir / "run.json").stat().st_ctime_ns, run_dir


def _insert(db: sqlite3.Connection, run_dir: Path, identity: RunIdentity, alive: bool | None, fingerprint: str) -> None:
    problems: list[JournalProblem] = []
    summary = Summary()
    for row in read(run_dir / "events", problems):
        summary.take(row)
        # a step is told by rank 0; the other ranks' step rows stay in their journals
        if row.kind in TABLES and (row.kind != "step" or row.rank == 0):
            entry = (identity.id, *row[:5], json.dumps(row.fields))
            db.execute(f"INSERT INTO {TABLES[row.kind]} VALUES (?,?,?,?,?,?,?)", entry)
    line = summary.result(identity, str(run_dir), read_summary(run_dir), alive=alive, problems=len(problems))
    if _insert_jobs(db, run_dir, identity.id) and line.status == "unknown":
        line = replace(line, status="launched")
    values = [json.dumps(v) if c in JSON_COLUMNS else v for c, v in zip(COLUMNS, astuple(line), strict=True)]
    columns = ", ".join((*COLUMNS, "fingerprint"))
    db.execute(f"INSERT INTO runs ({columns}) VALUES ({', '.join('?' * len(values))}, ?)", (*values, fingerprint))


def _insert_jobs(db: sqlite3.Connection, run_dir: Path, run_id: str) -> int:
    """The jobs that were launched for a run, as its own folder tells of them; how many."""
    jobs = 0
    for path in sorted(run_dir.glob("jobs/*/job.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(path.read_text())
            row = (facts["id"], run_id, facts["record"]["submitted"], json.dumps(facts))
            db.execute("INSERT OR REPLACE INTO jobs VALUES (?,?,?,?)", row)
            jobs += 1
    return jobs


def _forget(db: sqlite3.Connection, run_id: str) -> None:
    db.execute("DELETE FROM runs WHERE id=?", (run_id,))
    db.execute("DELETE FROM jobs WHERE run=?", (run_id,))
    for table in TABLES.values():
        db.execute(f"DELETE FROM {table} WHERE run=?", (run_id,))


def _run_row(row: tuple[Any, ...]) -> RunRow:
    return RunRow(**{c: json.loads(v) if c in JSON_COLUMNS else v for c, v in zip(COLUMNS, row, strict=True)})


def _fingerprint(run_dir: Path, alive: bool | None) -> str:
    """Changes whenever a row of the index could: journals only grow, the two other files are replaced."""
    sizes = [(segment.path.name, segment.path.stat().st_size) for segment in segments(run_dir / "events")]
    others = [path.stat() for path in (run_dir / "run.json", run_dir / "summary.json") if path.exists()]
    others += [path.stat() for path in sorted(run_dir.glob("jobs/*/job.json"))]
    return json.dumps([str(run_dir), alive, sizes, [(other.st_size, other.st_mtime_ns) for other in others]])


def _run_dirs(folder: Path) -> Iterator[Path]:
    """The run directories at or below `folder` (three levels) whose identity can be read."""
    for pattern in ("run.json", "*/run.json", "*/*/run.json", "*/*/*/run.json"):
        for path in folder.glob(pattern):
            try:
                RunIdentity.load(path.parent)
            except IdentityError:
                continue
            yield path.parent


def _no_run(wanted: str, names: list[str], path: Path) -> str:
    if not names:
        return f"no run {wanted!r}: the ledger {path} is empty."
    near = nearest(wanted, names)
    hint = f"Did you mean {near!r}?" if near else f"There are {', '.join(names[:8])}."
    return f"no run {wanted!r} in {path}. {hint}"
