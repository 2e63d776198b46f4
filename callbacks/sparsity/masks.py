"""What techniques share that mask weights: which ones, when, and how masks in place hold under every sharding.

A mask in place acts on gradients at every step, and on master weights and optimizer states when it changes; both
before the step, which carries the zeros to every copy. So a masked weight, its gradient and its moments are exactly 0
under one device, DDP and ZeRO-1/2/3, and keeping them so costs no communication. A rank keeps the masks of its own
slices only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..contract import IncompatibleTechniques, Technique, require
from ..parameters.accessor import shards_of
from ..parameters.layers import check_skip, trained_weights
from ..parameters.selection import keep_largest
from ..parameters.shards import Shards
from . import distributions, patterns, saliency


def must_find(module: nn.Module, skip: Sequence[str], technique: str) -> list[str]:
    """`trained_weights`, or `IncompatibleTechniques` if there are none, or a pattern that is the name of nothing."""
    check_skip(module, skip, technique)
    if not (names := trained_weights(module, skip)):
        raise IncompatibleTechniques(f"{technique} finds no weight to prune after skip={list(skip)}")
    return names


def require_distribution(technique: Technique, distribution: str | Mapping[str, float], names: Sequence[str]) -> None:
    if isinstance(distribution, str):
        require(distribution in names, technique, "distribution", f"{' | '.join(names)}, or patterns with a sparsity")
    else:
        legal = all(0 <= share < 1 for share in distribution.values())
        require(legal, technique, "distribution", "patterns of names, each with a share in [0, 1)")


def shapes_of(shards: Shards, names: Sequence[str]) -> dict[str, torch.Size]:
    return {name: shards.slices[name].shape for name in names}


def select(
    shards: Shards, scores: Mapping[str, Tensor], distribution: str | Mapping[str, float], sparsity: float
) -> dict[str, Tensor]:
    """Masks of this rank's slices that keep the largest `scores` ([length] each). Collective where sharded.

    "global" ranks the scores of all layers together; other distributions keep a share of each layer.
    """
    names = list(scores)
    shapes = shapes_of(shards, names)
    if distribution == "global":
        pieces, base = [], 0
        for name in names:
            pieces.append((scores[name], base + shards.slices[name].offset))
            base += shapes[name].numel()
        (masks,) = keep_largest([pieces], [base - int(sparsity * base)], shards.total)
        return dict(zip(names, masks, strict=True))
    counts = distributions.keep(distributions.densities(distribution, shapes, sparsity), shapes)
    return select_counts(shards, scores, counts)


def select_counts(shards: Shards, scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks that keep so many of each layer. Collective where sharded."""
    groups = [[(score, shards.slices[name].offset)] for name, score in scores.items()]
    chosen = keep_largest(groups, [counts[name] for name in scores], shards.total)
    return {name: mask for name, (mask,) in zip(scores, chosen, strict=True)}


def select_blocks(
    shards: Shards, scores: Mapping[str, Tensor], block: tuple[int, int], shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """As `select`, in whole blocks, which may lie across ranks: one layer at a time is gathered."""
    masks = {}
    for name, score in scores.items():
        whole = patterns.blocks(shards.gather(name, score), block, shares[name])
        masks[name] = shards.slices[name].cut(whole).to(score.device)
    return masks


def complete(shards: Shards, names: Sequence[str], restored: Mapping[str, Tensor], technique: str) -> dict[str, Tensor]:
    """Slices by name as a checkpoint gave them, with empty ones where this rank holds nothing of a parameter."""
    completed = {}
    for name in names:
        weight = shards.master(name)
        value = restored.get(name, torch.empty(0, dtype=torch.bool))
        if value.numel() != weight.numel():
            raise IncompatibleTechniques(
                f"{technique}: the checkpoint has no mask of {name}; start a new run, or add it to skip"
            )
        completed[name] = value.to(weight.device)
    return completed


def mask_gradients(shards: Shards, masks: Mapping[str, Tensor]) -> None:
    """Take what is masked out of this rank's gradients. Local."""
    for name, mask in masks.items():
        if mask.numel() and (gradient := shards.gradient(name)) is not None:
            shards.set_gradient(name, gradient * mask.to(gradient.device))


class Pruning(Technique, pl.Callback):
    """Whatever masks weights, in place or in the forward pass alone: its strength, its moment, what is told of it."""

    sparsity: float
    skip: Sequence[str]

    def check(self) -> None:
        require(0 <= self.sparsity < 1, self, "sparsity", "a share in [0, 1)")

    @classmethod
    def noop(cls) -> Self:
        return cls(sparsity=0.0)  # type: ignore[call-arg]

    def active(self) -> bool:
        """False at strength 0."""
        return self.sparsity > 0

    def update_masks(self, trainer: pl.Trainer, shards: Shards) -> dict[str, Tensor] | None:
        """New masks of this rank's slices, by name; None leaves them as they are. At the boundary only."""
        raise NotImplementedError

    def apply_masks(self, shards: Shards, masks: Mapping[str, Tensor]) -> None:
        """Make these the masks. Collective where sharded."""
        raise NotImplementedError

    def mask_dense_gradients(self, trainer: pl.Trainer, shards: Shards) -> None:
        """Change the dense gradients before the step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._kept: dict[str, float] = {}
        self.mask_version = 0

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.active():
            return
        shards = shards_of(trainer, pl_module)
        if not shards.at_boundary():
            return
        if (updated := self.update_masks(trainer, shards)) is not None:
            self.apply_masks(shards, updated)
        self.mask_dense_gradients(trainer, shards)

    def densities(self) -> dict[str, float]:
        """Share of weights that layers compute with, by parameter name."""
        return dict(getattr(self, "_kept", {}))

    def step_kind(self) -> int:
        return self.mask_version

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.densities(), "mask_version": getattr(self, "mask_version", 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = dict(state_dict["kept"])
        self.mask_version = state_dict["mask_version"]


class Masking(Pruning):
    """Base of the techniques that prune in place. `update_masks` says which masks are new before a step."""

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._masks: dict[str, Tensor] = {}  # this rank's slices, bool

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.active():
            return
        self._names = must_find(pl_module, self.skip, self.card.name)
        if self.mask_version:
            self._masks = complete(shards_of(trainer, pl_module), self._names, self._masks, self.card.name)

    def mask_dense_gradients(self, trainer: pl.Trainer, shards: Shards) -> None:
        mask_gradients(shards, self._masks)

    def among_kept(self, name: str, score: Tensor) -> Tensor:
        """Scores of this rank's slice, [length], in which what is pruned already comes last."""
        mask = self._masks.get(name)
        return saliency.among(torch.ones_like(score, dtype=torch.bool) if mask is None else mask, score)

    def apply_masks(self, shards: Shards, masks: Mapping[str, Tensor]) -> None:
        """Make these the masks, of weights and optimizer states too. Collective where sharded."""
        self._masks.update(masks)
        for name, mask in masks.items():
            shards.master(name).mul_(mask)
            for state in shards.state(name).values():
                state.mul_(mask)
        self._count(shards)

    def _count(self, shards: Shards) -> None:
        device = next(iter(self._masks.values())).device
        kept = shards.total(torch.stack([mask.sum().to(device) for mask in self._masks.values()]).to(torch.int64))
        self._kept = {n: k / shards.slices[n].numel for n, k in zip(self._masks, kept.tolist(), strict=True)}
        self.mask_version += 1

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Somebody has cut the model, and the masks with it."""
        if self._masks:
            self._count(shards_of(trainer, pl_module))

    # -- state ------------------------------------------------------------------------------------------------------
    def fragments(self) -> dict[str, dict[str, Tensor]]:
        return {"mask": dict(self._masks)} if getattr(self, "_masks", None) else {}

    def load_fragments(self, fragments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._masks = {name: mask.bool() for name, mask in fragments.get("mask", {}).items()}
