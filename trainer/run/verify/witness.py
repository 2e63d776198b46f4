"""What a run of few steps shows of itself: losses, the first gradients, the last weights. Whole tensors, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import update_wrapper
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ....callbacks.contract import Technique, silence
from ....callbacks.parameters.accessor import shards_of
from ....callbacks.parameters.shards import Shards
from ....callbacks.sampling.global_batches import GlobalBatches
from ....callbacks.sampling.samples import install_sampler
from .documents import apart, is_packed
from .dropout import SampleDropout
from .variants import Variant

Tensors = dict[str, Tensor]
UNKEYED = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass
class Seen:
    """What a variant has shown.

    Attributes:
        losses: Mean of each step's global batch.
        tensors: By kind (initial, gradient, weight, state, final), whole, on rank 0: trainable parameters and what
            techniques keep of each. The gradient is that of the first step, as the optimizer gets it before clipping.
        packed: Rows hold several documents.
        dropout: Masks were drawn.
        attention_dropout: Attention drops probabilities in training; it dropped none here.
        by_batch: Why what a step computes depends on how its global batch is cut; empty where it does not.
    """

    losses: list[float] = field(default_factory=list)
    tensors: dict[str, Tensors] = field(default_factory=dict)
    packed: bool = False
    dropout: bool = False
    attention_dropout: bool = False
    by_batch: str = ""


@silence
class Witness(pl.Callback):
    """The first callback of a fit; it adds the last one. Afterwards `seen` says what the run has shown.

    The run's data end amid its third step, so that four steps hold the last, partial batch of an epoch, too.

    Args:
        variant: Which is run.
        seed: The run's.
    """

    def __init__(self, variant: Variant, seed: int) -> None:
        self.variant, self.seed, self.seen = variant, seed, Seen()
        self._dropout, self._open = SampleDropout(seed, variant.dropout), ExitStack()
        self._positions: Tensor | None = None
        self._step, self._samples = 0, tuple[Any, ...]()
        self._order: GlobalBatches | None = None

    # -- around the module's step -----------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._open.enter_context(self._dropout.in_force())
        plain = pl_module.training_step

        def step(batch: Any, *args: Any) -> Any:
            if self.variant.apart and self._positions is not None:
                batch = apart(batch, self._positions)
            self._dropout.begin(batch, self._step, self._samples)
            return plain(batch, *args)

        update_wrapper(step, plain)  # Lightning looks for the function it is made of
        pl_module.training_step = step  # type: ignore[method-assign]
        self._open.callback(setattr, pl_module, "training_step", plain)
        self.seen.by_batch = _by_batch(pl_module)
        trainer.callbacks.append(_Last(self))  # type: ignore[attr-defined]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._open.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._open.close()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        drawn = None if self._order is None else self._order.drawn(batch_idx)
        self._step, self._samples = trainer.global_step, () if drawn is None else drawn.samples
        if is_packed(batch):
            self.seen.packed = True
        positions = batch.get("position_ids") if isinstance(batch, dict) else None
        self._positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None

    # -- data ------------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        order = self._order = install_sampler(trainer, self.seed)
        if order is None or order.micro != self.variant.micro:
            self.seen.by_batch = "the data are read by a loader of their own, in its own batches"
        if order is None:
            return
        order.remembers = True
        if order.global_batch > 1:
            order.base = _Beginning(order.base, 2 * order.global_batch + order.global_batch // 2)

    # -- the end, before techniques act on it -----------------------------------------------------------------------
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shards = shards_of(trainer, pl_module)
        self.keep(trainer, "weight", _weights(shards))
        self.keep(trainer, "state", _states(trainer, shards))
        self.seen.dropout, self.seen.attention_dropout = self._dropout.drawn, self._dropout.attention

    def keep(self, trainer: pl.Trainer, kind: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Copy whole tensors, one after another, to the host of rank 0."""
        kept = self.seen.tensors.setdefault(kind, {})
        for name, whole in tensors:
            if trainer.is_global_zero:
                kept[name] = whole.detach().to("cpu", copy=True)


@silence
class _Last(pl.Callback):
    """Sees what all other callbacks have done."""

    def __init__(self, witness: Witness) -> None:
        self.witness = witness
        self._loss: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = trainer.global_step
        self.witness.keep(trainer, "initial", _weights(shards_of(trainer, pl_module)))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        shards = shards_of(trainer, pl_module)
        if trainer.global_step == 0 and shards.at_boundary():
            self.witness.keep(trainer, "gradient", _gradients(shards))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it by the number of micro-batches
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if trainer.global_step == self._before or self._loss is None:
            return
        self._before = trainer.global_step
        mean = trainer.strategy.reduce(self._loss.double().clone(), reduce_op="mean")
        self.witness.seen.losses.append(float(mean))  # type: ignore[arg-type]
        self._loss = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.witness.keep(trainer, "final", _weights(shards_of(trainer, pl_module)))


class _Beginning:
    """The first samples of a sampler's order."""

    def __init__(self, sampler: Any, count: int) -> None:
        self.sampler, self.count = sampler, count

    def __len__(self) -> int:
        return min(self.count, len(self.sampler))

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.sampler), self.count)


# -- whole tensors by name; collective ------------------------------------------------------------------------------
def _weights(shards: Shards) -> Iterator[tuple[str, Tensor]]:
    for name in shards.slices:
        yield name, shards.whole(name)


def _gradients(shards: Shards) -> Iterator[tuple[str, Tensor]]:
    for name, where in shards.slices.items():
        local = shards.gradient(name)
        local = torch.zeros(where.length) if local is None else local
        yield name, shards.gather(name, local.float())


def _states(trainer: pl.Trainer, shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """What techniques keep of each parameter."""
    for technique in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(technique, Technique):
            continue
        for state, named in sorted(technique.fragments().items()):
            for name, local in named.items():
                yield f"{technique.card.name}'s {state} of {name}", shards.gather(name, local)


def _by_batch(module: nn.Module) -> str:
    """Why a step's result depends on how its global batch is cut; empty where nothing says so."""
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return f"{name} normalises by the statistics of each micro-batch"
        if isinstance(part, UNKEYED) and part.p > 0:
            return f"{name} is a {type(part).__name__}, whose masks are drawn for a micro-batch as a whole"
    return ""
