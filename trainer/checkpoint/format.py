"""Checkpoints on disk: complete or absent, never half, and verified before they are believed.

    checkpoints/000000120/           one directory a step, written as `.writing-…`, fsynced, then renamed
        manifest.json                sha256 and size of every file, and of itself; written last
        state.pt                     rank 0: loops, callbacks, schedulers, clock (tensors and plain data only)
        rank-00000.pt                each rank: random states, optimizer scalars
        tensors-00000.safetensors    each rank that holds something of its own: slices of masters, moments, averages
    checkpoints/latest               the name of the newest one

Nothing is unpickled that could run code. Slices are stored with their offsets in the flattened parameter, so a
checkpoint of one strategy and number of ranks loads under any other. What the manifest does not name is not read.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from ... import ShoestringError
from ...files import replace_file, sync_directory
from .hashed_files import safetensors_parts, write_hashed

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
MANIFEST = "manifest.json"
_NOTE = "written-"
_SEAL = ',\n "sha256": "'  # before the digest of all that precedes it in the manifest


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
    return {**write_states(folder, {rank_file(rank): packed(state)}), **write_tensors(folder, rank, tensors)}


def write_common(folder: Path, state: Mapping[str, Any]) -> dict:
    """Write rank 0's `state.pt`; returns its manifest entry."""
    return write_states(folder, {"state.pt": packed(state)})


def write_states(folder: Path, states: Mapping[str, bytes]) -> dict[str, Any]:
    """Write small files; returns their manifest entries."""
    return {name: write_hashed(folder / name, [content]) for name, content in states.items()}


def write_tensors(folder: Path, rank: int, tensors: Mapping[str, tuple[Piece, Tensor]]) -> dict[str, Any]:
    """Write what a rank holds of tensors, on the host; returns the manifest entry, empty where it has none."""
    if not tensors:
        return {}
    name = f"tensors-{rank:05d}.safetensors"
    pieces = {key: [p.offset, p.length, list(p.shape)] for key, (p, _) in tensors.items()}
    parts = safetensors_parts({key: t for key, (_, t) in tensors.items()}, {"pieces": json.dumps(pieces)})
    return {name: write_hashed(folder / name, parts)}


def packed(state: Mapping[str, Any]) -> bytes:
    """A state as the content of a `.pt` file."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def write_note(folder: Path, rank: int, files: Mapping[str, Any], about: Mapping[str, Any] | None) -> None:
    """Say in the working directory that a rank has written its `files`; rank 0 adds what the manifest says `about`."""
    replace_file(folder / f"{_NOTE}{rank:05d}.json", json.dumps({"files": dict(files), "about": about}))


def complete_interrupted(root: Path) -> int | None:
    """Publish what all ranks had written when they were killed or failed; the step, or None where there is nothing.

    It is verified like any other before it is used.
    """
    folder = max(root.glob(".writing-*"), default=None)
    try:
        if folder is None:
            return None
        step = int(folder.name.rpartition("-")[2])
        about = json.loads((folder / f"{_NOTE}{0:05d}.json").read_bytes())["about"]
        files: dict[str, Any] = {}
        for rank in range(about["world_size"]):
            files |= json.loads((folder / f"{_NOTE}{rank:05d}.json").read_bytes())["files"]
        if not (published := steps(root)) or step <= published[-1]:
            return None
        publish(root, step, files, about)
        return step
    except (OSError, ValueError, KeyError, TypeError):  # some rank had not come to its end
        return None


def publish(root: Path, step: int, files: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Complete the working directory: manifest, fsync, rename, then the pointer. Returns the final directory."""
    folder, final = working_directory(root, step), root / f"{step:09d}"
    manifest = {"format": FORMAT, "step": step, **about, "files": dict(sorted(files.items()))}
    replace_file(folder / MANIFEST, sealed(manifest))
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    sync_directory(root)
    replace_file(root / "latest", final.name)
    for note in final.glob(f"{_NOTE}*"):
        note.unlink()
    return final


# -- reading -------------------------------------------------------------------------------------------------------
def steps(root: Path) -> list[int]:
    """Steps that have a published checkpoint directory, oldest first."""
    return sorted(int(d.name) for d in root.glob("[0-9]*") if d.is_dir() and d.name.isdigit())


def sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON that ends in the sha256 of its own text: one flipped bit anywhere shows."""
    text = json.dumps(manifest, indent=1).removesuffix("\n}")
    return f'{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}'


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is as it was written."""
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
        if manifest["format"] > FORMAT:
            raise DamagedCheckpoint(f"{folder} has format {manifest['format']}; this version reads up to {FORMAT}")
        body, _, seal = text.rpartition(_SEAL)
        if seal != f'{hashlib.sha256(body.encode()).hexdigest()}"\n}}':
            raise ValueError("it has changed since it was written")
        del manifest["sha256"]
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder}: manifest.json cannot be read ({error!r})") from None


def verify(folder: Path, hashes: bool = True) -> dict[str, Any]:
    """The manifest of an intact checkpoint; raises `DamagedCheckpoint` naming the first file that is not as written.

    hashes: read the files; else only their sizes are compared.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if problem := changed(folder / name, entry, hashes):
            raise DamagedCheckpoint(f"{folder}: {problem}")
    return manifest


def changed(path: Path, entry: Mapping[str, Any], hashes: bool = True) -> str | None:
    """What is wrong with a file that was written with these "bytes" and "sha256"; None where it is as it was."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    if hashes and _sha256(path) != entry["sha256"]:
        return f"the content of {path.name} has changed since it was written"
    return None


def newest_intact(
    root: Path, check: Callable[[Path], Any] = verify, unusable: Mapping[int, str] | None = None
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes `check`, and a message for each damaged one that was passed over.

    unusable: steps whose checkpoints have turned out to be damaged, with the message for each. Raises
    `DamagedCheckpoint` if there are checkpoints and none is intact: starting over silently would lose the run.
    """
    problems: list[str] = []
    for step in reversed(steps(root)):
        folder = root / f"{step:09d}"
        try:
            if unusable and step in unusable:
                raise DamagedCheckpoint(unusable[step])
            check(folder)
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
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise EOFError(f"a {type(state).__name__} where a mapping was written")
        return state
    except (UnpicklingError, EOFError, RuntimeError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpoint(f"{path} holds more than tensors and plain data, or is damaged: {reason}") from None


class Pieces:
    """All ranks' tensors of a checkpoint: `cut(key, offset, length)` assembles any slice from whoever stored it.

    files: those of the manifest; None: all that lie there.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        there = files if files is not None else [path.name for path in folder.iterdir()]
        names = sorted(name for name in there if name.startswith("tensors-"))
        self._where: dict[str, list[tuple[Any, Piece]]] = {}
        try:
            for file in [safe_open(folder / name, framework="pt") for name in names]:
                for key, (offset, length, shape) in json.loads(file.metadata()["pieces"]).items():
                    self._where.setdefault(key, []).append((file, Piece(offset, length, tuple(shape))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{folder}: its tensors cannot be read ({error!r})") from None

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
def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file that is there."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
