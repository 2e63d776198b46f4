"""Checkpoints on disk: complete or absent, never half, and verified before they are believed.

    checkpoints/000000120/           one directory a step, written as `.writing-…`, fsynced, then renamed
        manifest.json                sha256 and size of every file; written last
        state.pt                     rank 0: loops, callbacks, schedulers, clock (tensors and plain data only)
        rank-00000.pt                each rank: random states, optimizer scalars
        tensors-00000.safetensors    each rank that holds something of its own: slices of masters, moments, averages
    checkpoints/latest               the name of the newest one

Nothing is unpickled that could run code. Slices are stored with their offsets in the flattened parameter, so a
checkpoint of one strategy and number of ranks loads under any other.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from ... import ShoestringError
from ...files import replace_file, sync_directory

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(ShoestringError):
    """A checkpoint whose files are not those of its manifest."""


@dataclass(frozen=True)
class Piece:
    """The place of a stored 1-D tensor in its flattened parameter: [offset, offset + length) of `shape`."""

    offset: int
    length: int
    shape: tuple[int, ...]


# -- writing -------------------------------------------------------------------------------------------------------
def working_directory(root: Path, step: int) -> Path:
    return root / f".writing-{step:09d}"


def write_rank(folder: Path, rank: int, state: Mapping[str, Any], tensors: Mapping[str, tuple[Piece, Tensor]]) -> dict:
    """Write one rank's files into the working directory; returns {file: {"bytes", "sha256"}}."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    written = [folder / f"rank-{rank:05d}.pt"]
    _save(state, written[0])
    if tensors:
        written.append(folder / f"tensors-{rank:05d}.safetensors")
        pieces = {key: [p.offset, p.length, list(p.shape)] for key, (p, _) in tensors.items()}
        flat = {key: t.detach().to("cpu").contiguous().clone() for key, (_, t) in tensors.items()}
        try:
            save_file(flat, written[1], metadata={"pieces": json.dumps(pieces)})
        except SafetensorError as error:  # how it wraps what the disk says
            raise OSError(str(error)) from None
    return {path.name: _seal(path) for path in written}


def write_common(folder: Path, state: Mapping[str, Any]) -> dict:
    """Write rank 0's `state.pt`; returns its manifest entry."""
    path = folder / "state.pt"
    _save(state, path)
    return {path.name: _seal(path)}


def publish(root: Path, step: int, files: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Complete the working directory: manifest, fsync, rename, then the pointer. Returns the final directory."""
    folder, final = working_directory(root, step), root / f"{step:09d}"
    manifest = {"format": FORMAT, "step": step, **about, "files": dict(sorted(files.items()))}
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    sync_directory(root)
    replace_file(root / "latest", final.name)
    return final


def prune(root: Path, keep: int, newest: int) -> None:
    """Keep `keep` checkpoints up to the one of step `newest`. Later ones are damaged ones that were passed over."""
    saved = steps(root)
    kept = [step for step in saved if step <= newest][-max(1, keep) :]
    for step in saved:
        if step not in kept:
            shutil.rmtree(root / f"{step:09d}", ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Remove directories that a killed writer left unfinished."""
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


# -- reading -------------------------------------------------------------------------------------------------------
def steps(root: Path) -> list[int]:
    """Steps that have a published checkpoint directory, oldest first."""
    return sorted(int(d.name) for d in root.glob("[0-9]*") if d.is_dir() and d.name.isdigit())


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            raise DamagedCheckpoint(f"{folder} has format {manifest['format']}; this version reads up to {FORMAT}")
        for value in (manifest["step"], manifest["world_size"], *(f["bytes"] for f in manifest["files"].values())):
            int(value)
        if not all(len(value["sha256"]) == 64 for value in manifest["files"].values()):
            raise ValueError("not every file has its sha256")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder}: manifest.json cannot be read ({error!r})") from None


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of an intact checkpoint; raises `DamagedCheckpoint` naming the first file that is not as written."""
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{folder}: {name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{folder}: {name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise DamagedCheckpoint(f"{folder}: the content of {name} has changed since it was written")
    return manifest


def newest_intact(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a message for each damaged one that was passed over.

    Raises `DamagedCheckpoint` if there are checkpoints and none is intact: starting over silently would lose the run.
    """
    problems: list[str] = []
    for step in reversed(steps(root)):
        folder = root / f"{step:09d}"
        try:
            verify(folder)
            return folder, problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    if problems:
        raise DamagedCheckpoint("no intact checkpoint is left:\n  " + "\n  ".join(problems))
    return None, problems


def read_state(path: Path) -> dict[str, Any]:
    """A `.pt` file of ours: tensors and plain data, never code. `DamagedCheckpoint` if it holds anything else."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpoint(f"{path} holds more than tensors and plain data, or is damaged: {reason}") from None


class Pieces:
    """All ranks' tensors of a checkpoint: `cut(key, offset, length)` assembles any slice from whoever stored it."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("tensors-*.safetensors"))]
        self._where: dict[str, list[tuple[Any, Piece]]] = {}
        for file in self._files:
            for key, (offset, length, shape) in json.loads(file.metadata()["pieces"]).items():
                self._where.setdefault(key, []).append((file, Piece(offset, length, tuple(shape))))

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._where[key][0][1].shape

    def cut(self, key: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of the flattened tensor `key`."""
        import torch

        parts: list[tuple[int, Tensor]] = []
        covered = 0
        for file, piece in self._where[key]:
            low, high = max(offset, piece.offset), min(offset + length, piece.offset + piece.length)
            if low < high:
                stored = file.get_slice(key)
                parts.append((low, stored[low - piece.offset : high - piece.offset]))
                covered += high - low
        if covered != length:
            raise DamagedCheckpoint(f"{key}: {covered} of {length} elements are in the checkpoint")
        if len(parts) == 1:
            return parts[0][1]
        return torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]) if parts else torch.empty(0)


# -- small steps ---------------------------------------------------------------------------------------------------
def _save(state: Mapping[str, Any], path: Path) -> None:
    """By way of memory: torch's own writer hides what the disk says, and these files are small."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    path.write_bytes(buffer.getbuffer())


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
