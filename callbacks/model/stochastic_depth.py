"""Stochastic depth: whole residual blocks are skipped at random, deeper ones more often (arXiv 1603.09382)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..accounting.clock import clock_of
from ..contract import Card, Effect, IncompatibleTechniques, Technique, Workload, derive_seed, require
from ..forward.blocks import blocks, costs_like, hidden_of, wrap_block
from ..forward.isolated_step import evaluating
from ..parameters.accessor import shards_of

SCALED = ("evaluation", "training")


def survival(block: int, count: int, last: float) -> float:
    """The chance that block `block` of `count` computes, counted from 0: it falls linearly to `last` at the deepest."""
    return 1.0 - (block + 1) / count * (1.0 - last)


def draw(seed: int, step: int, chances: Sequence[float]) -> frozenset[int]:
    """The blocks that are skipped in an optimizer step: the same on all ranks and in all of its micro-batches."""
    rolled = np.random.default_rng(derive_seed(seed, "stochastic_depth", step)).random(len(chances))
    return frozenset(np.flatnonzero(rolled >= np.asarray(chances)).tolist())


def scaled(before: Tensor, after: Tensor, factor: float) -> Tensor:
    """`before` plus `factor` times what the block has added to it; all [B, …]."""
    return before + factor * (after - before)


class _ZeroGradients(torch.autograd.Function):
    """The hidden state as it is, with a gradient of zero for each parameter: that of a block that added nothing.

    Without one, optimizers would leave moments and decay of a skipped block out under one strategy and not under
    another, and DDP would wait for gradients that do not come.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradient, *map(torch.zeros_like, ctx.parameters)


@dataclass(kw_only=True, eq=False, repr=False)
class StochasticDepth(Technique, pl.Callback):
    """Skip repeated residual blocks at random while training; all of them compute in evaluation.

    Which blocks a step skips is a pure function of the seed and the step. Blocks whose output has another shape than
    their input always compute. Skipped blocks have a gradient of zero.

    Source: arXiv 1603.09382.

    Args:
        last: The chance in (0, 1] that the deepest block computes; it falls linearly with depth, and 1 is off.
        scaled: "evaluation" multiplies what a block adds by its chance whenever the model is not training, as in the
            paper: the weights then need the same outside of this run. "training" divides by it while training, and the
            weights are an ordinary model's.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import StochasticDepth
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[StochasticDepth(last=0.8)])
        >>> [round(survival(block, count=4, last=0.5), 3) for block in range(4)]
        [0.875, 0.75, 0.625, 0.5]
    """

    card = Card(
        name="stochastic_depth",
        does="skips residual blocks at random, deeper ones more often",
        paper="1603.09382",
        saves={"flops", "time", "memory"},
        reads={"modules"},
        writes={"depth"},
    )

    last: float = 0.5
    scaled: str = "evaluation"

    def check(self) -> None:
        require(0 < self.last <= 1, self, "last", "a chance in (0, 1]")
        require(self.scaled in SCALED, self, "scaled", " | ".join(SCALED))

    def predict(self, workload: Workload) -> Effect:
        layers = max(1, workload.layers)
        mean = sum(survival(block, layers, self.last) for block in range(layers)) / layers
        return Effect(flops=mean, activations=mean)

    @classmethod
    def example(cls) -> Self:
        return cls(last=0.4)

    @classmethod
    def noop(cls) -> Self:
        return cls(last=1.0)

    # -- the run ----------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unwrap: list[Callable[[], None]] = []
        self._skipped: frozenset[int] = frozenset()
        self._skippable: dict[int, _Output | None] = {}  # by block, as far as they have been learned
        if self.last >= 1:
            return
        self._blocks = blocks(pl_module)
        if not self._blocks:
            raise IncompatibleTechniques(f"stochastic_depth finds no repeated blocks in {type(pl_module).__name__}")
        self._chances = [survival(i, len(self._blocks), self.last) for i in range(len(self._blocks))]
        for index, block in enumerate(self._blocks):
            self._unwrap.append(wrap_block(block, "skip", self._call(index, block)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sharded = any(hasattr(p, "ds_tensor") for p in pl_module.parameters())
        self._costs: dict[int, Hashable] = {}

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._costs.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.last >= 1 or batch_idx % trainer.accumulate_grad_batches:
            return
        self._skipped = draw(getattr(trainer, "seed", 0), clock_of(trainer).step, self._chances)

    def _call(self, index: int, block: nn.Module) -> Callable[..., Any]:
        chance = self._chances[index]

        def call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if block.training and index in self._skipped:
                if index not in self._skippable:
                    self._skippable[index] = _learned(block, before, inner, *args, **kwargs)
                    self._check_some_can_be_skipped()
                if (output := self._skippable[index]) is not None:
                    return output.of(_ZeroGradients.apply(before, *_whole_parameters(block)))  # type: ignore[no-untyped-call]
            computed = inner(*args, **kwargs)
            if block.training != (self.scaled == "training"):
                return computed
            return _with_hidden(computed, before, chance if self.scaled == "evaluation" else 1 / chance)

        return call

    def _check_some_can_be_skipped(self) -> None:
        if len(self._skippable) == len(self._blocks) and not any(self._skippable.values()):
            raise IncompatibleTechniques(
                f"stochastic_depth: no {type(self._blocks[0]).__name__} returns a hidden state of its input's shape"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Under ZeRO-3 a skipped block has no whole weights that could get a gradient: clear that of its last step."""
        if not self._skipped or not self._sharded:
            return
        shards = shards_of(trainer, pl_module)
        if not shards.at_boundary():
            return
        names = {id(p): name for name, p in shards.parameters.items()}
        for index in self._skipped:
            for p in self._blocks[index].parameters() if self._skippable.get(index) else ():
                if (name := names.get(id(p))) is not None and (gradient := shards.gradient(name)) is not None:
                    shards.set_gradient(name, torch.zeros_like(gradient))

    def step_kind(self) -> Hashable:
        """Return how many blocks of each kind are skipped; those still to be learned cost a forward more."""
        known = {index: self._skippable[index] for index in self._skipped if index in self._skippable}
        for index in known.keys() - self._costs.keys():
            self._costs[index] = costs_like(self._blocks[index])
        alike = Counter((self._costs[index], output and output.shape) for index, output in known.items())
        return frozenset(alike.items()), self._skipped.difference(known)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for unwrap in getattr(self, "_unwrap", []):
            unwrap()
        self._unwrap = []
        self.__dict__.pop("_blocks", None)


@dataclass(frozen=True)
class _Output:
    """What a block returns besides its hidden state [B, …], whose shape after B this is."""

    shape: tuple[int, ...]
    kind: type
    others: int  # that follow the hidden state in a tuple or list, all of them None

    def of(self, hidden: Tensor) -> Any:
        return hidden if self.kind is Tensor else self.kind((hidden, *[None] * self.others))


def _learned(block: nn.Module, before: Tensor, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> _Output | None:
    """What `block` returns, by a forward that leaves random states and buffers alone; None: it cannot be skipped."""
    with evaluating(block), torch.no_grad():
        out = inner(*args, **kwargs)
    after, others = hidden_of(out), list(out[1:]) if isinstance(out, tuple | list) else []
    if not isinstance(after, Tensor) or after.shape != before.shape or any(other is not None for other in others):
        return None
    return _Output(tuple(before.shape[1:]), type(out) if others or after is not out else Tensor, len(others))


def _with_hidden(out: Any, before: Tensor, factor: float) -> Any:
    """What a block returned, with what it added to its input times `factor`."""
    after = hidden_of(out)
    if not isinstance(after, Tensor) or after.shape != before.shape:
        return out
    changed = scaled(before, after, factor)
    return changed if after is out else type(out)((changed, *out[1:]))


def _whole_parameters(block: nn.Module) -> list[Tensor]:
    """Those that train and are here; ZeRO-3 has a piece of each."""
    return [p for p in block.parameters() if p.requires_grad and not hasattr(p, "ds_tensor")]
