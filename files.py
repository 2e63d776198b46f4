"""Files that are whole or not there, on machines that may stop at any moment.

`replace_file` is for small files that others read while we write: settings, summaries, records. They see the old
content or the new one, never half of it, and what has been replaced is on the disk.
"""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def replace_file(path: Path, content: str | bytes) -> None:
    """Give `path` this content in one atomic step, and its folder to it if there is none.

    Args:
        path: The file, which need not exist.
        content: All of it; text is written as UTF-8.

    Raises:
        OSError: The disk refuses it; `path` is as it was.
    """
    fresh = write_beside(path, content)
    try:
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_beside(path: Path, content: str | bytes) -> Path:
    """A durable file with this content in the folder of `path`; it is for the caller to give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # of its own even where hosts share the folder, and hidden from who looks for files like `path`
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with fresh.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    return fresh


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` as durable as the files' content, where the file system knows how to."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some network file systems
            raise
    finally:
        os.close(descriptor)
