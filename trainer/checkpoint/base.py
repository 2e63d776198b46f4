"""The frozen base of a fine-tuned model is named and hashed instead of saved: building the model loads it again.

A module says so by its attribute `frozen_base`. A checkpoint then holds what is trained beside the base, and its
manifest says which base that was; the base is compared before a run goes on from it, and before it is exported.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from ... import ShoestringError
from ...callbacks.accounting.agreement import Agreement
from ...callbacks.contract import Technique

if TYPE_CHECKING:
    from torch import Tensor


class AnotherBase(ShoestringError):
    """The frozen weights are others than those that the run was trained beside."""


@dataclass(frozen=True)
class FrozenBase:
    """Weights that building the model makes again, bit for bit.

    Attributes:
        source: What they are made from, as the user named it.
        weights: Their names in the LightningModule.
        bytes: That they have.
        digest: Gives the sha256 of what they are made from, or of themselves. Reads as many bytes.
        floats: "fp32" or "bf16": what those that are no codes were in.
    """

    source: str
    weights: frozenset[str]
    bytes: int
    digest: Callable[[], str]
    floats: str = "fp32"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"source": self.source, "sha256": self.digest(), "bytes": self.bytes, "floats": self.floats}


def of_module(module: Any) -> FrozenBase | None:
    """The base that a module names, if it does."""
    base = getattr(module, "frozen_base", None)
    return base if isinstance(base, FrozenBase) else None


def left_out(trainer: pl.Trainer, module: pl.LightningModule) -> FrozenBase | None:
    """The base that checkpoints of this run leave out; None where a technique may change it, or nothing makes it."""
    techniques = (c for c in trainer.callbacks if isinstance(c, Technique))  # type: ignore[attr-defined]
    changed = any({"weights", "modules"} & technique.card.writes for technique in techniques)
    return None if changed else of_module(module)


def agreed_identity(base: FrozenBase | None, trainer: pl.Trainer, agreement: Agreement) -> dict[str, Any] | None:
    """What the base is on every node, read by one rank of each. Collective.

    Raises:
        AnotherBase: The nodes have different ones.
    """
    mine = base.identity if base is not None and trainer.local_rank == 0 else None
    bases = [one for one in agreement.gather(mine) if one is not None]
    for rank, one in enumerate(bases):
        if one != bases[0]:
            raise AnotherBase(
                f"the frozen weights of {one['source']} differ between nodes: sha256 {bases[0]['sha256'][:12]} on the "
                f"first, {one['sha256'][:12]} on node {rank + 1} of {len(bases)}. Copy the same files to all of them."
            )
    return bases[0] if bases else None


def require(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None, where: Path) -> None:
    """`AnotherBase` where what was `saved` without its base is not beside the same one `now`."""
    if saved is None or (now is not None and now["sha256"] == saved["sha256"]):
        return
    was = f"{saved['source']} (sha256 {saved['sha256'][:12]})"
    there = "no base that can be loaded again" if now is None else f"{now['source']} with sha256 {now['sha256'][:12]}"
    raise AnotherBase(
        f"{where} holds what was trained beside the frozen weights of {was}, and here is {there}. "
        "Put the same weights back, or give another run directory."
    )


def digest_of_files(paths: Iterable[Path]) -> str:
    """The sha256 over the names and the contents of files."""
    whole = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {os.stat(path).st_size} {digest}\n".encode())
    return whole.hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over the names, types, shapes and values of tensors."""
    import torch

    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
