"""Gradual magnitude pruning: the smallest weights go first, along a cubic schedule (arXiv 1710.01878)."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..clock import Duration, clock_of
from ..contract import Card, Effect, Technique, Workload, require
from ..shards import Shards, shards_of
from .schedules import cubic
from .thresholds import kth_smallest


def prunable(module: nn.Module, skip: Sequence[str]) -> list[str]:
    """Names of the weights of linear and convolution layers, but for those that match a pattern in `skip`.

    Embeddings, norms and biases are never pruned; a weight tied to an embedding is an embedding. A weight shared by
    layers is named as `named_parameters` does, and left out if it matches under any of its names.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    aliases: dict[int, list[str]] = {}
    for prefix, layer in module.named_modules():
        weight: Any = getattr(layer, "weight", None)
        if isinstance(layer, kinds) and weight.requires_grad and id(weight) not in embeddings:
            aliases.setdefault(id(weight), []).append(f"{prefix}.weight" if prefix else "weight")
    kept = {
        weight
        for weight, names in aliases.items()
        if not any(fnmatch.fnmatch(name, pattern) for name in names for pattern in skip)
    }
    return [name for name, p in module.named_parameters() if id(p) in kept]


class GradualPruning(Technique, pl.Callback):
    """Raise every prunable weight's sparsity from 0 to `sparsity` between `start` and `end`, every `every` steps.

    `skip`: patterns of parameter names to leave dense. Masks act on gradients at each step and on masters and optimizer
    states when they change, before the step, which carries the zeros to every copy of the weights; so a pruned weight,
    its gradient and its moments are exactly 0 under every sharding. Masks only ever shrink. A masked dense weight runs
    at full cost: the saving in FLOPs is counted, not realised.
    """

    card = Card(
        name="gradual_pruning",
        does="prunes the smallest weights along a cubic schedule",
        paper="1710.01878",
        saves=frozenset({"size"}),
        writes=frozenset({"weights", "gradients", "optimizer"}),
        refuses=frozenset({"muon"}),  # its update mixes elements: zeros would not stay
    )

    def __init__(
        self,
        *,
        sparsity: float = 0.5,
        start: str = "10%",
        end: str = "70%",
        every: int = 10,
        skip: Sequence[str] = (),
    ) -> None:
        self.sparsity = sparsity
        self.start = start
        self.end = end
        self.every = every
        self.skip = skip

    def check(self) -> None:
        require(0 <= self.sparsity < 1, self, "sparsity", "a share in [0, 1)")
        require(self.every > 0, self, "every", "a positive number of steps")
        start, end = Duration.parse(self.start), Duration.parse(self.end)
        legal = start.counts == end.counts and start.amount < end.amount
        require(legal, self, "end", f"a later moment than start={self.start!r}, in the same unit")

    def predict(self, workload: Workload) -> Effect:
        return Effect(flops=1 - 0.6 * self.sparsity, realised=False)

    @classmethod
    def example(cls) -> Self:
        return cls(sparsity=0.6, start="0%", end="70%", every=2)

    @classmethod
    def inert(cls) -> Self:
        return cls(sparsity=0.0)

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._masks: dict[str, Tensor] = {}  # this rank's slices, bool
        self._kept: dict[str, float] = {}
        self.mask_version = 0
        self._start, self._end = Duration.parse(self.start), Duration.parse(self.end)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._names = prunable(pl_module, self.skip)
        if self.sparsity and not self._names:
            raise ValueError(f"gradual_pruning finds nothing to prune but what skip={list(self.skip)} leaves out")
        self._device = pl_module.device
        self._masks = {name: mask.to(self._device) for name, mask in self._masks.items()}

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.sparsity == 0:
            return
        shards = shards_of(trainer, pl_module)
        if not shards.at_boundary():
            return
        target = self._target(trainer)
        if target > 0 and (trainer.global_step % self.every == 0 or not self._masks):
            self._prune(shards, target)
        for name, mask in self._masks.items():
            if mask.numel() and (gradient := shards.gradient(name)) is not None:
                shards.set_gradient(name, gradient * mask.to(gradient.device))

    def _target(self, trainer: pl.Trainer) -> float:
        clock = clock_of(trainer)
        begun, ended = clock.toward(self._start), clock.toward(self._end)
        if begun < 1.0:
            return 0.0
        first = self._start.amount / self._end.amount
        return cubic((ended - first) / (1.0 - first), self.sparsity)

    def _prune(self, shards: Shards, target: float) -> None:
        """Mask the `target` share of smallest magnitudes of every layer; what is zero already is among them."""
        scores = [shards.master(name).abs() for name in self._names]
        counts = [int(target * shards.slices[name].numel) for name in self._names]
        thresholds = kth_smallest(scores, counts, shards.total)
        kept = torch.zeros(len(self._names), dtype=torch.int64, device=scores[0].device)
        for i, (name, score, threshold) in enumerate(zip(self._names, scores, thresholds, strict=True)):
            mask = score > threshold
            self._masks[name] = mask
            kept[i] = mask.sum()
            shards.master(name).mul_(mask)
            for state in shards.state(name).values():
                state.mul_(mask)
        total = shards.total(kept).tolist()
        self._kept = {name: n / shards.slices[name].numel for name, n in zip(self._names, total, strict=True)}
        self.mask_version += 1

    # -- what others may ask ----------------------------------------------------------------------------------------
    def densities(self) -> dict[str, float]:
        """Share of weights kept, by parameter name."""
        return dict(getattr(self, "_kept", {}))

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.densities(), "mask_version": getattr(self, "mask_version", 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = state_dict["kept"]
        self.mask_version = state_dict["mask_version"]

    def fragments(self) -> dict[str, dict[str, Tensor]]:
        return {"mask": dict(self._masks)} if getattr(self, "_masks", None) else {}

    def load_fragments(self, fragments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._masks = {name: mask.bool() for name, mask in fragments.get("mask", {}).items()}
