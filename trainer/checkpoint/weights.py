"""The weights of a run in a folder that others read: those that it ends with, and those of its best evaluation.

    final/  model.safetensors, or in parts model-00001-of-00003.safetensors … and model.safetensors.index.json
            adapter_model.safetensors where an adapter has been trained beside a base that is loaded again
            weights.json: size and sha256 of each file, the base, our names of weights that others call otherwise
    final.safetensors  a link to the weights where they are one file and have our names, for what reads one file

No rank holds more of it than a part. A module says what others call its weights by its method `published_names`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ...callbacks.accounting.agreement import Agreement
from ...files import replace_file, sync_directory
from . import format as checkpoint
from .hashed_files import safetensors_parts, write_hashed

MANIFEST = "weights.json"
PART_BYTES = 2 << 30


def save_weights(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    folder: Path,
    agreement: Agreement,
    base: frozenset[str] = frozenset(),
    base_identity: Mapping[str, Any] | None = None,
) -> str | None:
    """Write every weight in its own shape; ranks write parts in turn. The folder appears whole. Collective.

    Args:
        trainer, module: Of the run.
        folder: Replaced where it is there.
        agreement: Of its ranks.
        base: Frozen weights that are not to be held, for they are loaded again.
        base_identity: What those are.

    Returns:
        What the disk said against it, on all ranks.
    """
    from ...callbacks.parameters.accessor import shards_anew

    shards, frozen = shards_anew(trainer, module), {}
    sizes = {name: where.numel * shards.master_dtype(name).itemsize for name, where in shards.slices.items()}
    for name, (where, view) in shards.frozen().items():
        if name not in base:
            frozen[name], sizes[name] = (where, view), where.numel * view.element_size()
    buffers = dict(_kept_buffers(module))
    sizes |= {name: buffer.nbytes for name, buffer in buffers.items()}
    stem, published = published_names(module, list(sizes))
    parts, rank = _parts(sizes), trainer.global_rank
    working = folder.with_name(f"{folder.name}.writing")
    refusal: str | None = None
    if rank == 0:
        try:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
        except OSError as error:
            refusal = str(error)
    if (refusal := agreement.gather(refusal)[0]) is not None:
        return refusal
    files: dict[str, Any] = {}
    for number, names in enumerate(parts):
        mine = rank == number % trainer.world_size
        held: dict[str, torch.Tensor] = {}
        for name in names:
            if name in shards.slices:
                tensor = shards.whole(name)
            elif name in frozen:
                tensor = shards.whole_frozen(*frozen[name])
            else:
                tensor = buffers[name]
            if mine:
                held[published[name]] = tensor.detach().to("cpu").contiguous().clone()
        if mine and refusal is None:
            try:
                file = _file(stem, number, len(parts))
                files[file] = write_hashed(working / file, safetensors_parts(held, {"format": "pt"}))
            except OSError as error:
                refusal = str(error)
    gathered = agreement.gather((files, refusal))
    refusal = next((said for _, said in gathered if said), None)
    if rank == 0:
        try:
            if refusal is None:
                entries = {file: entry for written, _ in gathered for file, entry in written.items()}
                _describe(working, stem, entries, parts, sizes, published, base_identity if base else None)
                _put_in_place(working, folder)
                _link(folder, one=len(parts) == 1 and all(ours == theirs for ours, theirs in published.items()))
        except OSError as error:
            refusal = str(error)
        shutil.rmtree(working, ignore_errors=True)
    return agreement.gather(refusal)[0]


def published_names(module: nn.Module, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """How files of these weights begin, and what others call each; a module's own method says so, if it has one."""
    own = getattr(module, "published_names", None)
    return own(names) if own is not None else ("model", {name: name for name in names})


def _kept_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are part of a state dict: others are made anew with the module."""
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in module.named_buffers() if name not in passing}


def _parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, in parts of at most `PART_BYTES` unless one alone has more."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > PART_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _file(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def _describe(
    working: Path, stem: str, entries: Mapping[str, Any], parts: Sequence[Sequence[str]], sizes: Mapping[str, int],
    published: Mapping[str, str], base: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    if len(parts) > 1:
        places = {published[name]: _file(stem, n, len(parts)) for n, names in enumerate(parts) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        replace_file(working / f"{stem}.safetensors.index.json", json.dumps(index, indent=1))
    about: dict[str, Any] = {"files": dict(entries)}
    if base is not None:
        about["base"] = dict(base)
    if names := {theirs: ours for ours, theirs in published.items() if theirs != ours}:
        about["names"] = names
    replace_file(working / MANIFEST, json.dumps(about, indent=1))


def _put_in_place(working: Path, folder: Path) -> None:
    """A kill in the middle leaves the old folder under another name, which `_found` gives back."""
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    working.rename(folder)
    sync_directory(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link(folder: Path, *, one: bool) -> None:
    link, fresh = folder.with_name(f"{folder.name}.safetensors"), folder.with_name(f".{folder.name}.link")
    if not one:
        link.unlink(missing_ok=True)
        return
    fresh.unlink(missing_ok=True)
    with suppress(OSError):  # a file system without links
        fresh.symlink_to(Path(folder.name, _file("model", 0, 1)))
        fresh.replace(link)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _found(folder: Path) -> Path:
    return _old(folder) if not folder.exists() and _old(folder).exists() else folder


# -- reading ----------------------------------------------------------------------------------------------------------
def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights by the names that they have in the run's module.

    Raises:
        SafetensorError: A file is damaged.
        OSError: A file cannot be read.
    """
    from safetensors.torch import load_file

    folder = _found(folder)
    try:
        names = json.loads((folder / MANIFEST).read_bytes()).get("names", {})
    except (OSError, ValueError, AttributeError):  # put there by somebody else; or damaged, as `weights_problem` says
        names = {}
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {names.get(name, name): tensor for name, tensor in load_file(file).items()}
    return weights


def weights_exist(folder: Path) -> bool:
    """Whether weights are there, whatever their state."""
    return any(_found(folder).glob("*.safetensors"))


def weights_problem(folder: Path) -> str | None:
    """What is wrong with weights, going by the manifest beside them; None where they are as they were written."""
    folder = _found(folder)
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for file, entry in files.items():
            if problem := checkpoint.changed(folder / file, {"bytes": entry["bytes"], "sha256": entry["sha256"]}):
                return problem
        return None
    except FileNotFoundError:  # put there by somebody else
        return None if weights_exist(folder) else f"{folder.name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"


def weights_digest(folder: Path) -> str:
    """One word for these very weights: the sha256 over those of the files."""
    files = json.loads((_found(folder) / MANIFEST).read_bytes())["files"]
    return hashlib.sha256("".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files)).encode()).hexdigest()


def base_of_weights(folder: Path) -> dict[str, Any] | None:
    """The base that weights were trained beside and do not hold; None where they hold everything."""
    try:
        base = json.loads((_found(folder) / MANIFEST).read_bytes())["base"]
        known = {"source": str(base["source"]), "sha256": str(base["sha256"]), "bytes": int(base["bytes"])}
        return {**known, "floats": "bf16" if base.get("floats") == "bf16" else "fp32"}
    except (OSError, ValueError, KeyError, TypeError):
        return None
