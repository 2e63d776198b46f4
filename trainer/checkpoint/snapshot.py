"""What a rank saves of a step, copied to the host, and the thread that writes it while training goes on.

The thread starts no collective and draws no random numbers. It leaves a note beside the files it has written: where
every rank's is there, the checkpoint is whole, and a run that was killed before it was published has it all the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

import torch

from . import format as checkpoint
from .format import Piece

_CHUNK = 1 << 22  # elements that are looked at at once


class Snapshot:
    """Memory on the host that the state of a rank is copied to, again and again."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def take(
        self, pieces: Iterable[tuple[str, Piece, torch.Tensor]], drive: Path | None = None
    ) -> dict[str, tuple[Piece, torch.Tensor]]:
        """The pieces as they are now. What was taken before is overwritten.

        Args:
            pieces: Each is copied before the next one is asked for.
            drive: A folder that the copies lie in, where memory would not hold them: mapped files without names.
        """
        taken = {}
        for key, piece, tensor in pieces:
            kept = self._memory.pop(key, None)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = _empty(tensor, drive)
            taken[key] = piece, kept.copy_(tensor.detach())
        self._memory = {key: kept for key, (_, kept) in taken.items()}
        return taken


def _empty(like: torch.Tensor, drive: Path | None) -> torch.Tensor:
    if drive is None or not like.numel():
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
    with tempfile.NamedTemporaryFile(dir=drive, suffix=".snapshot") as file:
        os.posix_fallocate(file.fileno(), 0, like.nbytes)  # a full drive is an error here, and not a signal later
        flat = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
    return flat.view(like.shape)


class Writing(Thread):
    """Writes a rank's files of a step.

    Args:
        folder: The working directory, which is there.
        rank: Whose files they are.
        states: The names of its small files -> their contents.
        pieces: Its tensors, which nobody else writes to meanwhile.
        about: Of rank 0, for the manifest.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        states: Mapping[str, bytes],
        pieces: Mapping[str, tuple[Piece, torch.Tensor]],
        about: Mapping[str, Any] | None,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.folder, self.rank, self.about = folder, rank, about
        self._states, self._pieces = states, pieces
        self._error: BaseException | None = None
        self.files: dict[str, Any] = {}
        self.not_finite: str | None = None
        self.refusal: str | None = None
        self.began = perf_counter()
        self.start()

    def run(self) -> None:
        try:
            self.not_finite = next((name for name, (_, piece) in self._pieces.items() if spoilt(name, piece)), None)
            if self.not_finite is None:
                self.files = checkpoint.write_states(self.folder, self._states)
                self.files |= checkpoint.write_tensors(self.folder, self.rank, self._pieces)
                checkpoint.write_note(self.folder, self.rank, self.files, self.about)
        except OSError as error:
            self.refusal = f"{error.strerror or error}"
        except BaseException as error:
            self._error = error

    def finish(self) -> dict[str, Any]:
        """Wait, and tell: its files, or what is not finite, or what the disk said."""
        self.join()
        if self._error is not None:
            raise self._error
        return {"files": self.files, "not_finite": self.not_finite, "refusal": self.refusal}


def spoilt(name: str, tensor: torch.Tensor) -> bool:
    """Whether a piece of a checkpoint is a weight or a moment that is not finite, or a buffer with a NaN.

    Buffers hold infinities on purpose, as attention masks do; what techniques keep is theirs to judge.
    """
    kind = name.partition("/")[0]
    if not tensor.is_floating_point() or kind not in ("master", "optimizer", "buffer"):
        return False
    parts = tensor.split(_CHUNK)
    return any(bool((part.isnan() if kind == "buffer" else ~part.isfinite()).any()) for part in parts)
