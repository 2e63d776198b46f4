"""Which weights of an adapted model need not be saved: those that its files, or its seed, give again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..checkpoint.base import FrozenBase, digest_of_files, digest_of_tensors
from ..data.carried import resolve_name
from ..data.paths import model_folder
from .mapped_files import weight_files

if TYPE_CHECKING:
    from torch import nn

    from ...recipes import Recipe


def places(model: nn.Module) -> dict[int, int]:
    """Where the weights of a model that has just been built are: parameter -> memory.

    Those that the files of a pretrained model do not have were drawn anew and are left out.
    """
    drawn: frozenset[str] = getattr(model, "drawn_weights", frozenset())
    return {id(p): p.data_ptr() for name, p in model.named_parameters() if name not in drawn}


def frozen_base(recipe: Recipe, adapted: nn.Module, before: Mapping[int, int]) -> FrozenBase | None:
    """The base of a model with an adapter, in a LightningModule that calls it `model`; None where it cannot be had.

    before: the model's `places` when it had no adapter. A weight that the adapter has since replaced, as starts that
    take it apart do, is none of the base.
    """
    kept = {
        f"model.{name}": p
        for name, p in adapted.named_parameters()
        if not p.requires_grad and before.get(id(p)) == p.data_ptr()
    }
    size = sum(p.nbytes for p in kept.values())
    floats = "bf16" if any(p.dtype == torch.bfloat16 for p in kept.values()) else "fp32"
    if recipe.model.name is None:
        digest = digest_of_tensors(kept)
        return FrozenBase(f"model.config with seed {recipe.seed}", frozenset(kept), size, lambda: digest, floats)
    files = weight_files(model_folder(resolve_name(recipe.model.name), "model.name"))
    if not files:
        return None
    return FrozenBase(recipe.model.name, frozenset(kept), size, lambda: digest_of_files(files), floats)
