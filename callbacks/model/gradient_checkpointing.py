"""Gradient checkpointing: keep a block's input, recompute the rest in backward (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..contract import Card, Effect, IncompatibleTechniques, Technique, Workload, require
from ..forward.blocks import blocks, wrap_block

MODES = ("full", "selective")

_aten = torch.ops.aten
# expensive to compute, cheap to keep: what selective checkpointing does not recompute (arXiv 2205.05198 §5)
_KEPT = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default,
}  # fmt: skip


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recomputing(block: nn.Module, mode: str) -> Callable[..., Any]:
    """A call for `wrap_block` that makes `block` recompute in backward while training.

    The whole call is recomputed, hooks included, so parameters that ZeRO-3 has released are gathered again.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, **options, **kwargs)

    return call


@dataclass(kw_only=True, eq=False, repr=False)
class GradientCheckpointing(Technique, pl.Callback):
    """Recompute repeated blocks in the backward pass instead of keeping their activations.

    Works on any model with repeated blocks. Randomness inside a block is replayed, so the weights are the same bit for
    bit.

    Source: arXiv 1604.06174.

    Args:
        every: Every how many blocks one is recomputed: 1 is all of them, 0 is off.
        mode: "full" keeps only a block's input; "selective" also keeps matrix products and recomputes the cheap rest.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import GradientCheckpointing
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[GradientCheckpointing(mode="selective")])
    """

    card = Card(
        name="gradient_checkpointing",
        does="recomputes activations of repeated blocks in backward",
        paper="1604.06174",
        saves={"memory"},
        keeps="bits",
        reads={"modules"},
        writes={"activations"},
    )

    every: int = 1
    mode: str = "full"

    def check(self) -> None:
        require(self.every >= 0, self, "every", "0 (off), 1 (every block), 2 (every second), …")
        require(self.mode in MODES, self, "mode", " | ".join(MODES))

    def predict(self, workload: Workload) -> Effect:
        if not self.every:
            return Effect()
        share = 1 / self.every
        if self.mode == "selective":
            return Effect(flops=1 + 0.02 * share, activations=1 - 0.5 * share)
        return Effect(flops=1 + share / 3, activations=1 - 0.9 * share)

    @classmethod
    def noop(cls) -> Self:
        return cls(every=0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unwrap: list[Callable[[], None]] = []
        if stage != "fit" or not self.every:
            return
        repeated = blocks(pl_module)
        if not repeated:
            raise IncompatibleTechniques(
                f"gradient_checkpointing finds no repeated blocks in {type(pl_module).__name__}"
            )
        for block in repeated[:: self.every]:
            self._unwrap.append(wrap_block(block, "recompute", recomputing(block, self.mode)))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for unwrap in getattr(self, "_unwrap", []):
            unwrap()
        self._unwrap = []
