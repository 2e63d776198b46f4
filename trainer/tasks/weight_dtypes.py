"""What a model's weights are kept in: the recipe's `model.dtype`, and what the run computes in. No torch, for plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ...recipes.schema import ModelSpec


@dataclass(frozen=True)
class Kept:
    """floats: "fp32" or "bf16", of all weights but those in codes. codes: "nf4" or "int8" of linear layers, or None."""

    floats: str = "fp32"
    codes: str | None = None

    @property
    def name(self) -> str:
        """Of what most of a frozen base is in."""
        return self.codes or self.floats

    @property
    def dtype(self) -> torch.dtype:
        """Torch's name of `floats`."""
        import torch

        return torch.bfloat16 if self.floats == "bf16" else torch.float32


FLOAT32 = Kept()


def kept_in(model: ModelSpec, precision: str) -> Kept:
    """What the weights of a recipe's model are kept in, adapters apart, which are float32.

    Where the run does not compute in bf16, as where a finished model is read back, nothing is kept in bf16.
    """
    in_bf16 = precision == "bf16" and (model.adapter is not None or model.dtype == "bf16") and model.dtype != "fp32"
    return Kept("bf16" if in_bf16 else "fp32", model.dtype if model.dtype in ("nf4", "int8") else None)
