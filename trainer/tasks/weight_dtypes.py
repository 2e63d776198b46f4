"""What a model's weights are kept in: the recipe's `model.dtype`, and what the run computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ...recipes.schema import ModelSpec


@dataclass(frozen=True)
class Kept:
    """dtype: of all weights but those in `codes`. codes: "nf4" or "int8" for linear layers, None for none."""

    dtype: torch.dtype
    codes: str | None = None


FLOAT32 = Kept(torch.float32)


def kept_in(model: ModelSpec, precision: str) -> Kept:
    """What the weights of a recipe's model are kept in, adapters apart, which are float32.

    Where the run does not compute in bf16, as where a finished model is read back, nothing is kept in bf16.
    """
    in_bf16 = precision == "bf16" and (model.adapter is not None or model.dtype == "bf16") and model.dtype != "fp32"
    return Kept(torch.bfloat16 if in_bf16 else torch.float32, model.dtype if model.dtype in ("nf4", "int8") else None)
