"""Early exits: the model's own final layers learn to answer after intermediate blocks too (arXiv 2404.16710)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..contract import Card, Effect, Misconfigured, Technique, Workload, require
from ..forward.blocks import blocks, recorded, replayed
from ..forward.model_calls import logits_of
from ..forward.training_step import Step, add_auxiliary_loss, remove_from_step

MEASURES = ("confidence", "entropy")


# -- the pure core -----------------------------------------------------------------------------------------------------
def exit_weights(exits: Sequence[int], weight: float) -> list[float]:
    """The factor of each exit's loss: `weight` in all, rising with the number of blocks it has seen.

    Proportional to depth, as far as LayerSkip (arXiv 2404.16710 eq. 4) goes for one stage: `exit_weights([0, 2], 1.0)`
    is `[0.25, 0.75]`.
    """
    total = sum(index + 1 for index in exits)
    return [weight * (index + 1) / total for index in exits]


def sure(logits: Tensor, threshold: float, measure: str = "confidence") -> Tensor:
    """Whether logits [B, C] decide, bool [B].

    "confidence": the largest probability is at least `threshold`. "entropy": the distribution's entropy, as a share of
    the largest possible, is at most `threshold` (BranchyNet, arXiv 1709.01686 §III-D).
    """
    logs = logits.float().log_softmax(-1)
    if measure == "confidence":
        return logs.amax(-1).exp() >= threshold
    if measure == "entropy":
        entropy = -(logs.exp() * logs).sum(-1)
        return entropy <= threshold * torch.log(torch.tensor(float(logits.shape[-1])))
    raise ValueError(f"measure={measure!r} is not among {', '.join(MEASURES)}")


def exit_by_confidence(logits: Tensor, threshold: float, measure: str = "confidence") -> tuple[Tensor, Tensor]:
    """Return the logits [B, C] of the first exit that is `sure`, and its index [B]; from logits [E, B, C] of all exits.

    The last exit answers whatever it is.
    """
    decided = torch.stack([sure(each, threshold, measure) for each in logits])
    decided[-1] = True
    taken = decided.int().argmax(0)
    return logits[taken, torch.arange(logits.shape[1], device=logits.device)], taken


# -- inference ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Exited:
    """The result of a batch: `logits` [B, C] of the first sure exit, and after how many blocks it came, `depth` [B].

    `blocks_run` of `blocks` were computed: as many as the least sure sample of the batch needed.
    """

    logits: Tensor
    depth: Tensor
    blocks_run: int
    blocks: int

    @property
    def mean_depth(self) -> float:
        """Blocks a sample needed, on average."""
        return float(self.depth.float().mean())


@torch.no_grad()
def run_until_sure(
    model: nn.Module,
    *args: Any,
    threshold: float = 0.9,
    measure: str = "confidence",
    exits: Sequence[int] | None = None,
    **kwargs: Any,
) -> Exited:
    """Call `model(*args, **kwargs)` block by block and stop where every sample of the batch has a sure exit.

    exits: blocks, from 0, after which the final layers answer; all by default, and always the last. Of sequences
    [B, T, C] the last position decides, as in generation. Each exit costs one pass of what surrounds the blocks
    (embeddings and head); no block is computed twice, and none after the last exit taken. Best with batches of one.
    """
    if measure not in MEASURES:
        raise Misconfigured(f"measure={measure!r} is not allowed; use {' | '.join(MEASURES)}")
    repeated = _blocks(model)
    stops = sorted({*checked_exits(exits, len(repeated)), len(repeated) - 1})
    outputs: list[Any] = [None] * len(repeated)
    answers: list[Tensor] = []
    settled: Tensor | None = None
    ran = 0
    for stop in stops:
        logits = _up_to(model, repeated, outputs, range(ran, stop + 1), args, kwargs)
        ran = stop + 1
        answers.append(logits)
        now = sure(logits, threshold, measure)
        settled = now if settled is None else settled | now
        if bool(settled.all()):
            break
    chosen, taken = exit_by_confidence(torch.stack(answers), threshold, measure)
    depth = torch.tensor(stops, device=taken.device)[taken] + 1
    return Exited(chosen, depth, ran, len(repeated))


def _up_to(
    model: nn.Module, repeated: list[nn.Module], outputs: list[Any], fresh: range, args: Any, kwargs: Any
) -> Tensor:
    """The model's logits [B, C] after the last of the blocks `fresh`, which are computed now."""
    with replayed(repeated, outputs, fresh[-1], fresh):
        logits = logits_of(model(*args, **kwargs), "early_exit: the model")
    return logits if logits.ndim == 2 else logits[:, -1]


def _blocks(model: nn.Module) -> list[nn.Module]:
    repeated = blocks(model)
    if len(repeated) < 2:
        raise Misconfigured(f"early_exit finds no repeated blocks in {type(model).__name__} to exit between")
    return repeated


def checked_exits(exits: Sequence[int] | None, count: int) -> list[int]:
    """The blocks to exit after, of `count`: the given ones, or all but the last."""
    if exits is None:
        return list(range(count - 1))
    if stray := [index for index in exits if not 0 <= index < count - 1]:
        raise Misconfigured(f"early_exit: exits has {stray}; the model has {count} blocks: use 0 to {count - 2}")
    return sorted(set(exits))


# -- the technique -----------------------------------------------------------------------------------------------------
@dataclass(kw_only=True, eq=False, repr=False)
class EarlyExit(Technique, pl.Callback):
    """Add the task's own loss at intermediate exits, deeper exits more; `run_until_sure` uses the exits.

    An exit is the model's own final norm and head on the hidden state [B, T, D] after a block (a shared head: no new
    parameters); the loss is `training_step` itself, run again with every block answering what it has just computed. So
    any model with repeated blocks will do. All blocks run once on every rank, whatever the exits. Dropout outside the
    blocks is drawn anew at each exit; buffers and logged metrics are those of the whole model.

    Source: arXiv 2404.16710.

    Args:
        weight: Of the losses of all exits together, beside the model's own at 1; 0 is off.
        exits: Numbers of the blocks to exit after, from 0; None is all but the last.
        rotate: Each step trains every `rotate`-th exit, in turn.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import EarlyExit
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[EarlyExit(weight=0.5, exits=[3, 7])])
    """

    card = Card(
        name="early_exit",
        does="trains the final layers to answer after intermediate blocks too",
        paper="2404.16710",
        saves={"time"},
        reads={"modules"},
        writes={"loss", "activations"},  # those of the final layers, once for each exit
    )

    weight: float = 0.5
    exits: Sequence[int] | None = None
    rotate: int = 1

    def check(self) -> None:
        require(self.weight >= 0, self, "weight", "a number of at least 0")
        require(self.rotate >= 1, self, "rotate", "1 (every exit at each step), 2 (every second in turn), …")
        given = self.exits is None or (len(self.exits) > 0 and all(index >= 0 for index in self.exits))
        require(given, self, "exits", "numbers of blocks from 0, or null for all but the last")

    def predict(self, workload: Workload) -> Effect:
        return Effect()  # heads and embeddings, which a workload does not tell apart from blocks

    @classmethod
    def example(cls) -> Self:
        return cls(weight=0.5)

    @classmethod
    def noop(cls) -> Self:
        return cls(weight=0.0)

    # -- hooks ------------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.weight:
            return
        self._module, self._trainer = pl_module, trainer
        self._blocks = _blocks(pl_module)
        self._exits = checked_exits(self.exits, len(self._blocks))
        require(self.rotate <= len(self._exits), self, "rotate", f"at most {len(self._exits)}, the number of exits")
        add_auxiliary_loss(pl_module, self)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        remove_from_step(pl_module, self)
        for name in ("_module", "_trainer", "_blocks"):
            self.__dict__.pop(name, None)

    # -- the term in the loss ---------------------------------------------------------------------------------------
    @contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """Inside, note what every block returns."""
        with recorded(self._blocks) as outputs:
            yield outputs

    def compute(self, watched: list[Any], loss: Tensor, step: Step) -> Tensor:
        """The loss at the exits whose turn it is."""
        if missing := [index for index, output in enumerate(watched) if output is None]:
            raise Misconfigured(f"early_exit: blocks {missing} was not called in training_step")
        turn = self._trainer.global_step % self.rotate
        exits = self._exits[turn :: self.rotate]
        total = torch.zeros((), device=loss.device)
        for index, factor in zip(exits, exit_weights(exits, self.weight), strict=True):
            with _isolated(self._module), replayed(self._blocks, watched, index):
                total = total + factor * step.again()
        return total


@contextmanager
def _isolated(module: pl.LightningModule) -> Iterator[None]:
    """Inside, the module logs nothing, and its buffers are copies: it ends as if nothing had been run."""
    kept = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    silenced = {name: vars(module).get(name) for name in ("log", "log_dict")}
    for part, name, buffer in kept:
        part._buffers[name] = None if buffer is None else buffer.clone()
    for name in silenced:
        setattr(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for part, name, buffer in kept:
            part._buffers[name] = buffer
        for name, own in silenced.items():
            delattr(module, name)
            if own is not None:
                setattr(module, name, own)
