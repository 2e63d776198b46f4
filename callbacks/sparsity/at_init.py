"""What techniques share that prune once, before training: the data they look at, and when.

They look at the whole module in `setup`, before any strategy has sharded it, so second derivatives and many passes cost
nothing but that moment. All ranks read the same samples and take rank 0's decision; then the masks hold as anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..contract import Effect, IncompatibleTechniques, Workload, derive_seed, require
from ..forward.isolated_step import isolated_training_step
from ..parameters.accessor import shards_of
from ..parameters.selection import keep_largest
from ..parameters.shards import Shards
from ..sampling.samples import given_loaders
from ..sampling.seeding import seeded
from . import distributions
from .masks import Masking, must_find, require_distribution

Weights = Mapping[str, nn.Parameter]


@dataclass(kw_only=True, eq=False, repr=False)
class PruneAtInit(Masking):
    """Base of SNIP, GraSP and SynFlow, which differ in `scores` alone. What the settings mean stands there."""

    sparsity: float = 0.9
    samples: int = 128
    distribution: str | Mapping[str, float] = "global"
    skip: Sequence[str] = ()

    def check(self) -> None:
        super().check()
        require(self.samples > 0, self, "samples", "a positive number")
        require_distribution(self, self.distribution, distributions.NAMES)

    def predict(self, workload: Workload) -> Effect:
        return Effect(flops=1 - self.sparsity, realised=False)

    @classmethod
    def example(cls) -> Self:
        return cls(sparsity=0.6, samples=8)

    def wanted(self) -> int:
        """The number of samples that are looked at."""
        return self.samples

    def scores(self, module: pl.LightningModule, weights: Weights, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Return the importance of each weight, by name, in its shape; larger means kept."""
        raise NotImplementedError

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.active() or trainer.state.fn != "fit":
            return
        names = must_find(pl_module, self.skip, self.card.name)
        weights = {name: p for name, p in pl_module.named_parameters() if name in names}
        if any(hasattr(p, "ds_tensor") for p in weights.values()):
            raise IncompatibleTechniques(
                f"{self.card.name} needs the whole model, but this one is sharded from the start"
            )
        pl_module.to(trainer.strategy.root_device)
        seed = derive_seed(getattr(trainer, "seed", 0), self.card.name)
        with seeded(seed), isolated_training_step(pl_module):
            pl_module.train()
            batches = [pl_module.transfer_batch_to_device(b, pl_module.device, 0) for b in self._batches(trainer, seed)]
            scores = self.scores(pl_module, weights, batches)
        masks = trainer.strategy.broadcast(self._choose(scores))
        self._wholes: dict[str, Tensor] = {name: mask.to(weights[name].device) for name, mask in masks.items()}
        with torch.no_grad():
            for name, mask in self._wholes.items():
                weights[name].mul_(mask)

    def _batches(self, trainer: pl.Trainer, seed: int) -> list[Any]:
        """Micro-batches of the first samples of an order of our own; no loader's generator is touched."""
        loader = given_loaders(trainer)
        if not isinstance(loader, DataLoader):
            raise IncompatibleTechniques(
                f"{self.card.name} needs one DataLoader to draw samples from, not {type(loader).__name__}"
            )
        dataset: Any = loader.dataset
        if isinstance(dataset, IterableDataset):
            samples = list(islice(iter(dataset), self.wanted()))
        else:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
            samples = [dataset[i] for i in order[: self.wanted()].tolist()]
        size = loader.batch_size or len(samples)
        return [loader.collate_fn(samples[i : i + size]) for i in range(0, len(samples), size)]

    def _choose(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, score in scores.items():
            if not bool(score.isfinite().all()):
                raise IncompatibleTechniques(
                    f"{self.card.name}: scores of {name} are not finite; skip it, or use another criterion"
                )
        shapes = {name: score.shape for name, score in scores.items()}
        flat = {name: score.detach().reshape(-1) for name, score in scores.items()}
        if self.distribution == "global":
            starts, count = [], 0
            for score in flat.values():
                starts.append(count)
                count += score.numel()
            pieces = list(zip(flat.values(), starts, strict=True))
            (chosen,) = keep_largest([pieces], [count - int(self.sparsity * count)], _all_here)
        else:
            shares = distributions.densities(self.distribution, shapes, self.sparsity)
            counts = distributions.keep(shares, shapes)
            groups = [[(score, 0)] for score in flat.values()]
            chosen = [mask for (mask,) in keep_largest(groups, [counts[name] for name in flat], _all_here)]
        return {name: mask.view(shapes[name]).cpu() for name, mask in zip(flat, chosen, strict=True)}

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.active() or self.mask_version:
            return
        if trainer.global_step:
            raise IncompatibleTechniques(
                f"{self.card.name}: the checkpoint has no masks; start a new run, or resume without this technique"
            )
        shards = shards_of(trainer, pl_module)
        cut = {name: shards.slices[name].cut(self._wholes.pop(name)) for name in self._names}
        self.apply_masks(shards, shards.beside_masters(cut))

    def update_masks(self, trainer: pl.Trainer, shards: Shards) -> None:
        return None


def _all_here(values: Tensor) -> Tensor:
    return values


def gradients_of(loss: Tensor, weights: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """dloss/dw in the weights' shapes; 0 for a weight that has no part in the loss."""
    gradients = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
