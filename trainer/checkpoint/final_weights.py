"""The weights that a run ends with, in one file that others read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ...files import replace_file
from . import format as checkpoint
from .hashed_files import safetensors_parts, write_hashed


def save_final_weights(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    path: Path,
    base: frozenset[str] = frozenset(),
    base_identity: Mapping[str, Any] | None = None,
) -> str | None:
    """Write the model, every weight in its own shape, to one safetensors file. Collective; rank 0 writes.

    Beside it a `.json` keeps its size and sha256. base: frozen weights that are not to be held, for they are loaded
    again; base_identity: what they are, for the `.json`. Returns what the disk said against it, on rank 0.
    """
    from ...callbacks.parameters.accessor import shards_anew

    shards = shards_anew(trainer, module)
    whole: dict[str, torch.Tensor] = {}
    first = trainer.global_rank == 0
    for name in shards.slices:
        tensor = shards.whole(name)
        if first:
            whole[name] = tensor.detach().to("cpu").contiguous().clone()
    for name, (where, view) in shards.frozen().items():
        if name in base:
            continue
        tensor = view.view(where.shape) if where.length == where.numel else shards.gather_slice(where, view)
        if first:
            whole[name] = tensor.detach().to("cpu").contiguous().clone()
    if first:
        for name, buffer in module.named_buffers():
            whole[name] = buffer.detach().to("cpu").contiguous().clone()
        partial = path.with_suffix(".writing")
        try:
            entry = write_hashed(partial, safetensors_parts(whole))
            about = {"base": base_identity} if base else {}
            partial.rename(path)
            replace_file(path.with_suffix(".json"), json.dumps({**entry, **about}))
        except OSError as error:
            partial.unlink(missing_ok=True)
            return str(error)
    return None


def base_of_final(path: Path) -> dict[str, Any] | None:
    """The base that final weights were trained beside and do not hold; None where they hold everything."""
    try:
        base = json.loads(path.with_suffix(".json").read_bytes())["base"]
        known = {"source": str(base["source"]), "sha256": str(base["sha256"]), "bytes": int(base["bytes"])}
        return {**known, "floats": "bf16" if base.get("floats") == "bf16" else "fp32"}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def final_problem(path: Path) -> str | None:
    """What is wrong with final weights, going by the `.json` beside them; None where they are as they were written."""
    try:
        entry = json.loads(path.with_suffix(".json").read_bytes())
        return checkpoint.changed(path, {"bytes": entry["bytes"], "sha256": entry["sha256"]})
    except FileNotFoundError:  # put there by somebody else
        return None if path.is_file() else f"{path.name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path.with_suffix('.json').name} cannot be read ({error!r})"
