"""Files of numbers as arrays that stay on disk."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

AROUND = 64 << 10  # bytes that the system maps around a place that is read
HELD = 64 << 20  # bytes of a map that are held, about


class MappedNumbers:
    """The numbers of a file [N], read through a memory map that lets go of what has been read.

    What is let go stays in the system's cache of files, where every process finds it; else a run over a large set would
    come to hold all of it.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._map: mmap.mmap | None = None
        self._touched = 0
        self._all = np.empty(0, dtype=self.dtype)
        if path.stat().st_size:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._all = np.frombuffer(self._map, dtype=self.dtype)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, part: slice) -> np.ndarray:
        """A copy of a part."""
        numbers = np.array(self._all[part])
        self._touched += numbers.nbytes + AROUND
        if self._touched > HELD and self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return numbers
