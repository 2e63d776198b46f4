"""Weight clustering: the weights of a layer share a few values, and learn to (Deep Compression, arXiv 1510.00149)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..accounting.clock import Duration, clock_of
from ..contract import Card, IncompatibleTechniques, Technique, require
from ..forward.forward_weights import ForwardWeights, straight_through
from ..parameters.accessor import shards_of
from ..parameters.layers import check_skip, trained_weights
from ..parameters.shards import Shards
from .codebooks import INITS, LARGEST, clustered, first_codebooks, lloyd

PORTION = 2**24  # weights, with some 30 bytes each while they are sorted


def _portions(names: Sequence[str], shards: Shards) -> list[list[str]]:
    """Weights to fit in one go: few, for sorting them takes memory, and not one by one, for each go is a few sums."""
    portions: list[list[str]] = [[]]
    size = 0
    for name in names:
        size += shards.slices[name].numel  # not this rank's length: ranks must agree
        if size > PORTION and portions[-1]:
            portions.append([])
            size = shards.slices[name].numel
        portions[-1].append(name)
    return portions


@dataclass(kw_only=True, eq=False, repr=False)
class WeightClustering(Technique, pl.Callback):
    """From `start` on, compute with `clusters` distinct weights in each layer; at the end these are its weights.

    Forward uses every weight's nearest centroid, backward passes the gradient straight through to the weight itself,
    which moves on and may change cluster. The saving is in storage: `shoestring export --to torch --quantize trained`
    takes 2 bits a weight for 4 clusters, 4 for 16, 8 for 256. Fitting costs a few dozen sums over ranks of some hundred
    numbers, in no other step.

    Source: arXiv 1510.00149.

    Args:
        clusters: Distinct weights in a layer; 0 is off.
        start: Duration after which codebooks are fitted by k-means.
        every: Steps between fits, each from where the last one ended.
        init: First centroids: "linear" (evenly from the smallest to the largest weight) or "density".
        keep_zero: Hold one centroid at 0, so that what is pruned stays so.
        iterations: Of k-means in a fit.
        skip: Patterns of parameter names to leave alone.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import WeightClustering
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[WeightClustering(clusters=16, start="30%")])
    """

    card = Card(
        name="weight_clustering",
        does="makes the weights of a layer share a few values",
        paper="1510.00149",
        saves={"size"},
        writes={"weights"},
        refuses={"schedule_free_adamw"},  # whose final weights are not those that it finds centres of
    )

    clusters: int = 16
    start: str = "50%"
    every: int = 100
    init: str = "linear"
    keep_zero: bool = True
    iterations: int = 20
    skip: Sequence[str] = ()

    def check(self) -> None:
        least = 2 + bool(self.keep_zero)
        legal = self.clusters == 0 or least <= self.clusters <= LARGEST
        require(legal, self, "clusters", f"0 (off) or a number from {least} to {LARGEST}")
        require(self.every > 0, self, "every", "a positive number of steps")
        require(self.iterations > 0, self, "iterations", "a positive number")
        require(self.init in INITS, self, "init", " | ".join(INITS))
        Duration.parse(self.start)

    @classmethod
    def example(cls) -> Self:
        return cls(clusters=8, start="30%", every=3)

    @classmethod
    def noop(cls) -> Self:
        return cls(clusters=0)

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._codebooks: dict[str, Tensor] = {}
        self._shown: ForwardWeights | None = None
        self._seen = -1
        self._start = Duration.parse(self.start)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.clusters:
            return
        check_skip(pl_module, self.skip, self.card.name)
        self._names = trained_weights(pl_module, self.skip)
        if not self._names:
            raise IncompatibleTechniques(f"weight_clustering finds no layers after skip={list(self.skip)}")
        self._device = pl_module.device
        self._codebooks = {name: book.to(self._device) for name, book in self._codebooks.items()}
        self._shown = ForwardWeights(pl_module, self._names, self._show)

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Somebody has cut the model: codebooks fit what is left of a layer until they are made anew."""
        if self._shown is not None:
            self._shown.reinstall()

    def _show(self, name: str, weight: Tensor) -> Tensor:
        codebook = self._codebooks.get(name)
        return weight if codebook is None else straight_through(weight, clustered(weight.detach(), codebook))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._shown is None or step == self._seen:
            return
        if self._seen >= 0:
            self._shown.check_used(self.card.name)
        self._seen = step
        if self._codebooks and step % self.every:
            return
        if clock_of(trainer).toward(self._start) >= 1.0:
            self._fit(shards_of(trainer, pl_module))

    @torch.no_grad()
    def _fit(self, shards: Shards) -> None:
        for names in _portions(self._names, shards):
            values = [shards.master(name).to(self._device) for name in names]  # from the host, if offloaded
            books = [self._codebooks[name] for name in names if name in self._codebooks]
            if not books:
                books = first_codebooks(values, self.clusters, self.init, self.keep_zero, shards.total)
            books = lloyd(values, books, self.keep_zero, self.iterations, shards.total)
            self._codebooks.update(zip(names, books, strict=True))

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What forward has seen becomes what is there: no other fit, or the model would not be the evaluated one."""
        shards = shards_of(trainer, pl_module)
        for name, codebook in self._codebooks.items():
            master = shards.master(name)
            master.copy_(clustered(master, codebook.to(master.device)))
        if self._codebooks:
            shards.publish()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if getattr(self, "_shown", None) is not None:
            self._shown.remove()  # type: ignore[union-attr]
        self._shown = None

    # -- what others may ask ----------------------------------------------------------------------------------------
    def codebooks(self) -> dict[str, Tensor]:
        """The shared values of every clustered weight, float32 [clusters] ascending, by parameter name."""
        return dict(getattr(self, "_codebooks", {}))

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"codebooks": {name: book.tolist() for name, book in self.codebooks().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._codebooks = {name: torch.tensor(book) for name, book in state_dict["codebooks"].items()}
