"""A folder on a local drive that optimizer state lies in, in place of host memory (ZeRO-Infinity, arXiv 2104.07857).

Each process has a folder of its own in it, which goes with it: what was there is nothing that a later run could use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ... import ShoestringError
from .extensions import SHARED, extensions_dir, filesystem, prebuild

_OF_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_PREFIX = "shoestring-"
MIB = 32  # of what `transfer` writes
_TRANSFER = """
import os, sys, time, torch
from deepspeed.ops.op_builder import AsyncIOBuilder
handle, path, size = AsyncIOBuilder().load().aio_handle(), sys.argv[1], int(sys.argv[2]) << 20
like = torch.empty(0, dtype=torch.uint8)
written, read = handle.new_cpu_locked_tensor(size, like), handle.new_cpu_locked_tensor(size, like)
written.copy_(torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(os.getpid())))
began = time.perf_counter()
handle.sync_pwrite(written, path)
between = time.perf_counter()
handle.sync_pread(read, path)
ended = time.perf_counter()
if not torch.equal(written, read):
    sys.exit("what was read is not what was written")
print(size / (between - began), size / (ended - between))
"""


class NvmeError(ShoestringError):
    """A folder that optimizer state cannot lie in."""


def problem(folder: Path, needed: float = 0.0) -> str | None:
    """What keeps optimizer state from lying in a folder, in words; None where nothing does.

    Args:
        folder: It, or one that it would be made in, must be there.
        needed: Bytes that must be free.
    """
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is no folder that can be written to"
    kind = filesystem(there)
    if kind in _OF_MEMORY:
        return f"{there} is in memory ({kind}), and not on a drive"
    if kind.startswith(SHARED):
        return f"{there} is on a network file system ({kind}), and not on a drive of this machine"
    free = shutil.disk_usage(there).free
    if free < needed:
        return f"{there} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} GiB are needed"
    return None


def claim(folder: Path) -> Path:
    """Make a folder for this process alone in `folder`; those of processes that are no more are removed.

    Raises:
        NvmeError: State cannot lie there.
    """
    if (fault := problem(folder)) is not None:
        raise NvmeError(f"strategy.nvme: {fault}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".claims", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # of the ranks that start together, one at a time
        for old in folder.glob(f"{_PREFIX}*"):
            if not _in_use(old):
                shutil.rmtree(old, ignore_errors=True)
        own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        _held[own] = os.open(own / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(_held[own], fcntl.LOCK_EX)
    return own


def release(own: Path) -> None:
    """Remove a folder that `claim` has made."""
    shutil.rmtree(own, ignore_errors=True)
    if own in _held:
        os.close(_held.pop(own))


_held: dict[Path, int] = {}  # folder of this process -> its lock, which the kernel drops with the process


def _in_use(folder: Path) -> bool:
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # it was killed before it had one
        return False
    except OSError:
        return True
    return False


def transfer(folder: Path) -> tuple[float, float]:
    """Write and read some MiB as DeepSpeed would, in a process of its own: (bytes a second written, read).

    Raises:
        NvmeError: async_io does not load, or what was read is not what was written.
    """
    own = claim(folder)
    try:
        prebuild(["async_io"])
        environment = {"TORCH_EXTENSIONS_DIR": str(extensions_dir()), **os.environ}
        process = subprocess.run(
            [sys.executable, "-c", _TRANSFER, str(own / "bytes"), str(MIB)],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        with contextlib.suppress(ValueError, IndexError):
            written, read = map(float, process.stdout.splitlines()[-1].split())
            if process.returncode == 0:
                return written, read
        raise NvmeError(f"async_io: {(process.stderr.strip() or process.stdout.strip()).splitlines()[-1]}")
    finally:
        release(own)
