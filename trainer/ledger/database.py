"""The SQLite file under the ledger: where it lies, how it is opened, what its tables are."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from ... import ShoestringError
from .runs import COLUMNS

PATIENCE = 60.0  # seconds a writer waits for another one
VERSION = 1
TABLES = {
    "claim": "claims", "estimate": "estimates", "measurement": "measurements", "verdict": "verdicts",
    "event": "events", "step": "steps",
}  # fmt: skip

_RUNS = f"CREATE TABLE IF NOT EXISTS runs ({', '.join(COLUMNS)}, fingerprint, PRIMARY KEY (id)) WITHOUT ROWID"
_ENTRIES = (
    "CREATE TABLE IF NOT EXISTS {} (run, rank INTEGER, attempt INTEGER, seq INTEGER, t REAL, mono REAL, fields TEXT, "
    "PRIMARY KEY (run, rank, attempt, seq)) WITHOUT ROWID"
)
_JOBS = "CREATE TABLE IF NOT EXISTS jobs (id, run, submitted REAL, fields TEXT, PRIMARY KEY (id)) WITHOUT ROWID"
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "glusterfs"}
_UNOPENED = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class LedgerError(ShoestringError):
    """The ledger's file cannot be used, or no run matches what was asked for."""


class LedgerBusy(LedgerError):
    """Another process has kept the ledger locked for longer than `PATIENCE`."""


@contextmanager
def read_connection(path: Path) -> Iterator[sqlite3.Connection | None]:
    """A connection for queries; None if there is no ledger yet, and then none is made."""
    if not path.exists():
        yield None
        return
    with explained(path), closing(_connect_to_read(path)) as connection:
        version = _version(connection, path)
        if version and _new_columns(connection):
            with write_connection(path):
                pass
        yield connection if version else None


@contextmanager
def write_connection(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection inside one transaction: all of it is kept, or nothing if the block raises."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(
            f"cannot make {path.parent}: {error.strerror}. Set SHOESTRING_HOME to a folder that you can write to."
        ) from None
    with explained(path), closing(_begin(path)) as connection:
        try:
            _prepare(connection, path)
            yield connection
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk has rolled it back already
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors in words that name the file and the way out."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", None) or 0
        if code & 0xFF in _BUSY:
            raise LedgerBusy(f"the ledger {path} has been busy for {PATIENCE:.0f} s. Try again later.") from error
        raise LedgerError(
            f"the ledger {path} cannot be used ({error}). It is only an index: "
            "`shoestring runs rebuild` makes it again from the runs."
        ) from error


def _connect(path: Path, options: str) -> sqlite3.Connection:
    # autocommit, so that BEGIN and COMMIT are where this file says
    return sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True, timeout=PATIENCE, isolation_level=None)


def _connect_to_read(path: Path) -> sqlite3.Connection:
    connection = _connect(path, "mode=rw")
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode & 0xFF not in _UNOPENED:
            raise
        return _connect(path, "immutable=1")  # somebody else's ledger, on a disk we may only read
    return connection


def _begin(path: Path) -> sqlite3.Connection:
    """A connection that holds the write lock.

    A new ledger gets a write-ahead log, so that readers never wait. That needs shared memory, which two machines do
    not share and some file systems do not have: there the plain rollback journal serves.
    """
    connection = _connect(path, "mode=rwc")
    try:
        if not _version(connection, path):
            _switch(connection, "DELETE" if _on_network(path) else "WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("BEGIN IMMEDIATE")
        return connection
    except BaseException as error:
        connection.close()
        if not isinstance(error, sqlite3.OperationalError) or error.sqlite_errorcode & 0xFF in _BUSY:
            raise
    connection = _connect(path, "mode=rwc")
    try:
        # alone with the file, SQLite can leave the write-ahead log without shared memory
        for statement in ("locking_mode=EXCLUSIVE", "journal_mode=DELETE", "locking_mode=NORMAL"):
            connection.execute(f"PRAGMA {statement}")
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _switch(connection: sqlite3.Connection, mode: str) -> None:
    """Set the journal mode; unlike everything else this does not wait for other processes by itself."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute(f"PRAGMA journal_mode={mode}")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _on_network(path: Path) -> bool:
    """Whether the file lies on a file system that other machines may write too (Linux; False if unknown)."""
    try:
        mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    where = {left.split()[4]: right.split()[0] for left, right in mounts}
    kind = next((where[str(folder)] for folder in path.resolve().parents if str(folder) in where), "")
    return kind in _NETWORK or kind.startswith("fuse.")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, VERSION):
        raise LedgerError(
            f"the ledger {path} has version {version}, this program reads {VERSION}. It is only an index: "
            "`shoestring runs rebuild` makes it again from the runs, or set SHOESTRING_HOME to another folder."
        )
    return version


def _new_columns(connection: sqlite3.Connection) -> list[str]:
    """The columns of runs that a ledger of before does not have."""
    known = {row[1] for row in connection.execute("PRAGMA table_info(runs)")}
    return [column for column in COLUMNS if column not in known]


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if not _version(connection, path):
        connection.execute(_RUNS)
        for table in TABLES.values():
            connection.execute(_ENTRIES.format(table))
        connection.execute(f"PRAGMA user_version={VERSION}")
    for column in _new_columns(connection):
        connection.execute(f"ALTER TABLE runs ADD COLUMN {column}")
    connection.execute(_JOBS)  # ledgers of before have none
