"""Mixed precision: compute in 16 bits, keep master weights in 32 (arXiv 1710.03740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import pytorch_lightning as pl

from ..contract import Card, Effect, IncompatibleTechniques, Settings, Technique, Workload, require

_LIGHTNING = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}


@dataclass(kw_only=True, eq=False, repr=False)
class MixedPrecision(Technique, pl.Callback):
    """Compute matrix products in 16 bits and keep master weights in 32.

    Under DDP and on one device this is autocast over fp32 weights; under ZeRO the weights are 16 bit and the optimizer
    keeps sharded fp32 masters. A `pl.Trainer` has to be made with the precision that goes with it.

    Source: arXiv 1710.03740.

    Args:
        dtype: "bf16" (no loss scaling), "fp16" (dynamic loss scaling, CUDA only) or "fp32" (off).

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import MixedPrecision, Settings
        >>> technique = MixedPrecision(dtype="bf16")
        >>> precision = technique.edit(Settings()).precision
        >>> trainer = pl.Trainer(precision=precision, max_steps=1000, callbacks=[technique])
        >>> precision
        'bf16-mixed'
    """

    card = Card(
        name="mixed_precision",
        does="computes in bf16 or fp16 and keeps fp32 master weights",
        paper="1710.03740",
        saves={"time", "memory", "communication"},
        keeps="result",
        writes={"numerics"},
    )

    dtype: str = "bf16"

    def check(self) -> None:
        require(self.dtype in _LIGHTNING, self, "dtype", " | ".join(sorted(_LIGHTNING)))

    def needs(self) -> frozenset[str]:
        return {"bf16": frozenset({"bf16"}), "fp16": frozenset({"fp16"})}.get(self.dtype, frozenset())

    def edit(self, settings: Settings) -> Settings:
        return settings.replace(precision=_LIGHTNING[self.dtype])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        wanted = _LIGHTNING[self.dtype]
        if self.dtype != "fp32" and str(trainer.precision) != wanted:
            raise IncompatibleTechniques(
                f"{self!r} must be known before the trainer is made, and this one has precision={trainer.precision!r}. "
                f"Use pl.Trainer(precision={wanted!r}), or shoestring.trainer.Trainer(techniques=[...])."
            )

    def predict(self, workload: Workload) -> Effect:
        if self.dtype == "fp32":
            return Effect()
        return Effect(activations=0.5, communication=0.5)

    @classmethod
    def noop(cls) -> Self:
        return cls(dtype="fp32")
