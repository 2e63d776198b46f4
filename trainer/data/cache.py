"""A folder is built once, by whichever process comes first, and is then only read.

Two ranks, or two runs on one machine, ask for the same tokenized data at the same moment. One takes the lock and
builds into a private folder; a rename makes the result appear whole; the others wait, then find it. A killed builder
leaves no result and no lock: the kernel drops the lock with the process, and the private folder is never looked at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ...directories import home
from ...files import replace_file

SETTLED_SECONDS = 2.0


def cache_root(workdir: Path) -> Path:
    """`$SHOESTRING_HOME/cache` where that variable is set (shared by all runs), else `workdir/.cache`."""
    return home() / "cache" if os.environ.get("SHOESTRING_HOME") else Path(workdir) / ".cache"


def digest(parts: Iterable[str | bytes]) -> str:
    """32 hex digits over the parts in order; the lengths go in too, so ("ab", "c") differs from ("a", "bc")."""
    sha = hashlib.sha256()
    for part in parts:
        # surrogatepass: one lone surrogate in a user's JSON must not stop the run
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:32]


def file_digest(path: Path, cache: Path | None = None) -> str:
    """32 hex digits of a file's bytes, read in pieces.

    cache: where to remember them, under the file's name, size and the moment of its last change as the kernel notes it,
    which no program sets. One that changed within the last seconds is read: it may change again at the same moment.
    """
    there = path.stat()
    known = cache and cache / "digests" / digest(
        [str(path.resolve()), f"{there.st_ino} {there.st_size}", f"{there.st_ctime_ns}"]
    )
    if known and known.exists():
        return known.read_text()
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    if known and time.time() - there.st_ctime > SETTLED_SECONDS:
        known.parent.mkdir(parents=True, exist_ok=True)
        replace_file(known, content)
    return content


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, calling `build(private_folder)` first if it does not exist yet.

    Safe against any number of processes: without a working lock (some network file systems) two may build, and the
    first rename wins. An exception in `build` leaves nothing behind.
    """
    from filelock import FileLock

    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _build(folder, build)
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    private = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(private)
        private.rename(folder)
    except OSError:
        if not folder.exists():  # else another process finished first: its result is as good as ours
            raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
