"""Weight averaging: evaluate and ship the average of the weights along the way (EMA, or LAWA arXiv 2209.14981)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..accounting.clock import Duration, clock_of
from ..contract import Card, Effect, IncompatibleTechniques, Technique, Workload, require
from ..parameters.accessor import shards_of
from ..parameters.shards import Shards
from .other_weights import OtherWeights


def ema_(average: Tensor, weights: Tensor, decay: float) -> None:
    """average = decay * average + (1 - decay) * weights, in place, in the precision of `average`."""
    average.lerp_(weights.to(average.dtype), 1.0 - decay)


def kept(master: Tensor) -> Tensor:
    """A copy to average, in float32 at least: bfloat16 cannot add a thousandth."""
    return master.detach().to(torch.promote_types(master.dtype, torch.float32), copy=True)


def normalized_by_batch(module: nn.Module) -> str | None:
    """The first layer of a model that normalises by running statistics of its batches; None where none does."""
    kinds = nn.modules.batchnorm._NormBase
    running = (n for n, m in module.named_modules() if isinstance(m, kinds) and m.running_mean is not None)
    return next(running, None)


@dataclass(kw_only=True, eq=False, repr=False)
class WeightAveraging(Technique, OtherWeights):
    """Keep an average of the master weights; validate with it and leave it as the final model.

    Averages are kept on this rank's slices, in float32 whatever the weights are in: there is no communication but one
    refresh of the copies per evaluation. A weight that is exactly 0 is 0 in the average too, so masks survive. Models
    with batch norms are refused: their running statistics are not those of the averaged weights.

    Source: arXiv 2209.14981.

    Args:
        kind: "ema", an exponential average, or "lawa", the mean of the last `keep` weights.
        decay: Of "ema", per optimizer step, in [0, 1). 0 is off, for both kinds.
        every: Steps between the weights that "lawa" keeps.
        keep: How many weights "lawa" keeps.
        start: Duration before which nothing is averaged.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import WeightAveraging
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[WeightAveraging(decay=0.999, start="10%")])
    """

    card = Card(
        name="weight_averaging",
        does="evaluates and keeps the average of the weights along the run",
        paper="2209.14981",
        saves={"steps"},
        reads={"weights"},
        writes={"weights"},
        refuses={"schedule_free_adamw"},  # which averages itself
    )

    kind: str = "ema"
    decay: float = 0.99
    every: int = 10
    keep: int = 6
    start: str = "0%"

    def check(self) -> None:
        require(self.kind in ("ema", "lawa"), self, "kind", "ema | lawa")
        require(0 <= self.decay < 1, self, "decay", "a number in [0, 1)")
        require(self.every > 0 and self.keep > 0, self, "every", "positive numbers for every and keep")
        Duration.parse(self.start)

    def predict(self, workload: Workload) -> Effect:
        copies = 1 if self.kind == "ema" else self.keep
        return Effect(states=1 + copies * 4 / 16)

    @classmethod
    def example(cls) -> Self:
        return cls(decay=0.8)

    @classmethod
    def noop(cls) -> Self:
        return cls(decay=0.0)

    # -- taking averages --------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._averages: dict[str, dict[str, Tensor]] = {}
        self._seen = -1
        self._start = Duration.parse(self.start)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.decay and (layer := normalized_by_batch(pl_module)) is not None:
            raise IncompatibleTechniques(
                f"weight_averaging: {layer!r} normalises by running statistics of its batches, which belong to the "
                "weights as they were, not to their average. Use layer, group or instance norms, set "
                "track_running_stats=False, or leave weight_averaging out."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.global_step
        if self._averages:  # read from a checkpoint, perhaps before the weights were brought to their device
            shards = shards_of(trainer, pl_module)
            self._averages = {slot: shards.beside_masters(named) for slot, named in self._averages.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.decay == 0 or step == self._seen:
            return
        self._seen = step
        if self._start.amount and clock_of(trainer).toward(self._start) < 1.0:
            return
        shards = shards_of(trainer, pl_module)
        if self.kind == "ema":
            self._ema(shards)
        elif step % self.every == 0:
            self._take(shards, step)

    @torch.no_grad()
    def _ema(self, shards: Shards) -> None:
        averages = self._averages.get("ema")
        if averages is None:
            self._averages["ema"] = {name: kept(shards.master(name)) for name in shards.slices}
            return
        for name, average in averages.items():
            ema_(average, shards.master(name), self.decay)

    def _take(self, shards: Shards, step: int) -> None:
        slot = f"lawa{step // self.every % self.keep}"
        self._averages[slot] = {name: kept(shards.master(name)) for name in shards.slices}

    def _average(self, name: str) -> Tensor:
        parts = [weights[name] for _, weights in sorted(self._averages.items())]
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)

    # -- using them -------------------------------------------------------------------------------------------------
    def has_other_weights(self) -> bool:
        return bool(getattr(self, "_averages", None))

    def other_weights(self, shards: Shards, name: str) -> Tensor:
        return self._average(name) * (shards.master(name) != 0)

    # -- state ------------------------------------------------------------------------------------------------------
    def fragments(self) -> dict[str, dict[str, Tensor]]:
        return getattr(self, "_averages", {})

    def load_fragments(self, fragments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._averages = {state: dict(weights) for state, weights in fragments.items()}
