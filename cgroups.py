"""CPUs and memory that this process may use: the machine's, or what its control groups leave where that is less.

Control groups of version 2 and of version 1 are read, with the groups around the process's own: what Slurm gives a job,
for one, is not written down in the groups of its tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Cores this process may run on: the smaller of its affinity and its cgroup's CPU quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _cpu_quotas())]))


def usable_memory() -> int:
    """Bytes of host memory this process may fill: the machine's, or its cgroup's limit where that is lower."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit.bytes for limit in _memory_limits())])


def available_memory() -> int:
    """Bytes of host memory that could be filled now: the machine's, or what a cgroup leaves where that is less."""
    import psutil

    return min([int(psutil.virtual_memory().available), *(limit.bytes - limit.used() for limit in _memory_limits())])


class _MemoryFiles(NamedTuple):
    """Where a version of control groups says how much memory there may be, how much is used, and is cache of it."""

    limit: str
    usage: str
    cache: str


_MEMORY = (
    _MemoryFiles("memory.max", "memory.current", "inactive_file"),
    _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class _MemoryLimit(NamedTuple):
    bytes: int
    folder: Path
    files: _MemoryFiles

    def used(self) -> int:
        """Without the files in the page cache that would be dropped first; 0 where nobody says."""
        counted = dict(line.split(maxsplit=1) for line in _read(self.folder / "memory.stat").splitlines())
        return int(_read(self.folder / self.files.usage) or 0) - int(counted.get(self.files.cache, 0))


def _memory_limits() -> Iterator[_MemoryLimit]:
    for folder in _groups("memory"):
        for files in _MEMORY:
            limit = _read(folder / files.limit).strip()
            if limit.isdigit():  # or "max"
                yield _MemoryLimit(int(limit), folder, files)


def _cpu_quotas() -> Iterator[float]:
    """Cores' worth of time that the groups allow."""
    for folder in _groups("cpu"):
        words = _read(folder / "cpu.max").split()
        words = words or [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and words[0].isdigit() and int(words[1] or 0):  # "max" or -1: no limit
            yield int(words[0]) / int(words[1])


def _groups(controller: str) -> set[Path]:
    """This process's groups, whether or not they can be seen: inside a container often only the root can."""
    groups = {ROOT, ROOT / controller}
    for line in _read(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):  # version 2 is one tree for all
            own = Path(controllers and controller, path.lstrip("/"))
            groups |= {ROOT / group for group in (own, *own.parents)}
    return groups


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""
