"""Teacher logits on disk: what was computed once is read in later epochs, after a restart, and by other runs.

A folder per teacher holds one append-only file per process that wrote there. A record is one sample: its key, the
sizes, a checksum, then the float16 values [n, columns] and the int32 class numbers [n, k] of its n positions. A record
is there as soon as it is written, also when the process is killed right after; one that was cut off or damaged counts
as absent and is computed again. Nobody writes to another's file, so any number of processes may share a folder.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_HEAD = struct.Struct("<16sIIII")  # key, positions, columns, k, crc32 of what follows
SUFFIX = ".logits"


def sample_keys(inputs: Sequence[tuple[str, Tensor]], lengths: Sequence[int] | None, width: int) -> list[bytes]:
    """A key of 16 bytes for every sample: a hash of what the model sees of it.

    inputs: the named tensors that the model is called with, [B, …]; others belong to every sample. lengths [B]: where
    each sample ends in dimension 1 of the tensors that are `width` long, so that a key does not depend on how far its
    batch is padded; None where nothing is padded.
    """
    rows = [(name, tensor.detach().cpu()) for name, tensor in sorted(inputs, key=lambda pair: pair[0])]
    size = max(len(tensor) for _, tensor in rows)
    keys = []
    for i in range(size):
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in rows:
            row = tensor[i] if len(tensor) == size else tensor
            if lengths is not None and tensor.ndim >= 2 and tensor.shape[1] == width and len(tensor) == size:
                row = row[: lengths[i]]
            digest.update(f"{name} {row.dtype} {tuple(row.shape)}".encode())
            digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        keys.append(digest.digest())
    return keys


class LogitCache:
    """Records by key, of one teacher under one choice of settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._where: dict[bytes, tuple[Path, int]] = {}
        self._scanned: dict[Path, int] = {}
        self._readers: dict[Path, BinaryIO] = {}
        self._writer: BinaryIO | None = None
        self._mine: Path | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self._where)

    def refresh(self) -> None:
        """Learn what other processes have written by now."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path != self._mine:
                self._scanned[path] = self._scan(path, self._scanned.get(path, 0))

    def get(self, key: bytes) -> tuple[Tensor, Tensor] | None:
        """(values [n, columns] float16, class numbers [n, k] int64) of a sample, or None."""
        if (place := self._where.get(key)) is None:
            return None
        path, offset = place
        file = self._reader(path)
        file.seek(offset)
        if len(head := file.read(_HEAD.size)) < _HEAD.size:
            return None
        stored_key, n, columns, k, checksum = _HEAD.unpack(head)
        body = file.read(_size(n, columns, k))
        if stored_key != key or zlib.crc32(body) != checksum:
            del self._where[key]
            return None
        split = 2 * n * columns
        values = np.frombuffer(body, dtype="<f2", count=n * columns).reshape(n, columns)
        kept = np.frombuffer(body, dtype="<i4", offset=split).reshape(n, k)
        return torch.from_numpy(values.copy()), torch.from_numpy(kept.astype(np.int64))

    def put(self, key: bytes, values: Tensor, kept: Tensor) -> None:
        """Write a sample's record, unless it is there."""
        if key in self._where:
            return
        body = values.cpu().numpy().astype("<f2").tobytes() + kept.cpu().numpy().astype("<i4").tobytes()
        file, path = self._open()
        offset = file.tell()
        head = _HEAD.pack(key, len(values), values.shape[1], kept.shape[1], zlib.crc32(body))
        file.write(head + body)
        file.flush()
        self._where[key] = path, offset

    def close(self) -> None:
        """Let go of all files, the own one on disk for good."""
        if self._writer is not None:
            os.fsync(self._writer.fileno())
            self._writer.close()
            self._writer = None
        for reader in self._readers.values():
            reader.close()
        self._readers = {}

    def _scan(self, path: Path, offset: int) -> int:
        """Index the records from `offset` on; returns where the first incomplete one begins."""
        size, file = path.stat().st_size, self._reader(path)
        while offset + _HEAD.size <= size:
            file.seek(offset)
            key, n, columns, k, _ = _HEAD.unpack(file.read(_HEAD.size))
            end = offset + _HEAD.size + _size(n, columns, k)
            if end > size:
                break
            self._where.setdefault(key, (path, offset))
            offset = end
        return offset

    def _reader(self, path: Path) -> BinaryIO:
        if path not in self._readers:
            self._readers[path] = open(path, "rb")  # noqa: SIM115
        return self._readers[path]

    def _open(self) -> tuple[BinaryIO, Path]:
        if self._writer is None or self._mine is None:
            rank = os.environ.get("RANK", "0")
            self._mine = self.folder / f"{time.time_ns():020d}-{rank}-{os.getpid()}{SUFFIX}"
            self._writer = open(self._mine, "xb")  # noqa: SIM115
        return self._writer, self._mine


def _size(n: int, columns: int, k: int) -> int:
    return 2 * n * columns + 4 * n * k


def lengths_of(mask: Tensor) -> list[int]:
    """Return the position of the last True of each row of [B, T], plus one."""
    ends = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * ends).amax(1).tolist()
