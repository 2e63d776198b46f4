"""A LightningModule's own `training_step`, and what techniques do around it for the length of a fit.

The step is wrapped once, however many techniques want something of it, and comes back as it was when the last one has
left. Before it, samples are chosen from the batch (`choose_samples`); during it, it is watched, and after it, terms are
added to its loss (`add_auxiliary_loss`). All of it is inside the step: precision, DDP and DeepSpeed treat a term like
any other part of the loss, what was not chosen is not counted, and what scoring costs is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Protocol

import pytorch_lightning as pl
from torch import Tensor

from ... import ShoestringError

SAMPLE_WEIGHTS = "sample_weights"  # in a batch: [B], the factor of each sample's loss
LOSS_WEIGHT = "loss_weight"  # in a batch: [], the factor of its mean loss; see sampling/global_batches.py
_IGNORED = -100  # a label that no loss counts, as in torch's cross entropy


class NoLoss(ShoestringError):
    """A training step that returns no loss, or none that can be added to."""


class CannotChoose(ShoestringError):
    """The samples of this batch cannot be told apart, or their weights would be lost."""


@dataclass(frozen=True)
class Step:
    """The module's own step, and what it was called with."""

    call: Callable[..., Any]
    args: tuple[Any, ...]

    @property
    def batch(self) -> Any:
        return self.args[0]

    def again(self) -> Tensor:
        """The loss [] of one more run of the module's own step."""
        return _loss(self.call(*self.args))


@dataclass(frozen=True)
class Chosen:
    """The samples of a batch that are trained on.

    Args:
        rows: Their positions in the batch, [k] with k >= 1.
        weights: The factor of each one's loss, [k]; the sum is still divided by the number of what is chosen. None: 1.
    """

    rows: Tensor
    weights: Tensor | None = None


class SampleChooser(Protocol):
    def choose(self, step: Step) -> Chosen | None:
        """Which samples of `step.batch` to train on; None for all of them. Scoring forwards happen here."""
        ...


class AuxiliaryLoss(Protocol):
    def capture(self) -> AbstractContextManager[Any]:
        """Open around the module's own step; what it gives is handed to `compute`."""
        ...

    def compute(self, watched: Any, loss: Tensor, step: Step) -> Tensor:
        """Return what to add to the module's own `loss`, []."""
        ...


class WrappedStep:
    """Stands in for `training_step`.

    Args:
        plain: The module's own.

    Attributes:
        chosen: Called with the batch that is trained on and its rows in the one before, where techniques choose.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        update_wrapper(self, plain)  # Lightning looks for the function it is made of
        self.plain = plain
        self.choosers: list[SampleChooser] = []
        self.terms: list[AuxiliaryLoss] = []
        self.chosen: Callable[[Any, Tensor], None] = lambda batch, rows: None

    def __call__(self, *args: Any) -> Any:
        unread = None
        for chooser in self.choosers:
            if (chosen := chooser.choose(Step(self.plain, args))) is not None:
                batch = unread = select(args[0], chosen)
                args = (batch, *args[1:])
                self.chosen(batch, chosen.rows)
        with ExitStack() as stack:
            watched = [stack.enter_context(term.capture()) for term in self.terms]
            out = self.plain(*args)
        if isinstance(unread, _Weighted):
            unread.check_read()
        if out is None:  # Lightning's way to skip a batch
            return None
        if not self.terms:
            return out
        loss, step = _loss(out), Step(self.plain, args)
        total = loss
        for term, seen in zip(self.terms, watched, strict=True):
            total = total + term.compute(seen, loss, step)
        return {**out, "loss": total} if isinstance(out, Mapping) else total


def _loss(out: Any) -> Tensor:
    loss = out.get("loss") if isinstance(out, Mapping) else out
    if not isinstance(loss, Tensor):
        raise NoLoss(f"training_step returned {type(out).__name__}; it must return the loss or a dict with 'loss'")
    return loss


# -- choosing ----------------------------------------------------------------------------------------------------------
class _Weighted(dict[str, Any]):
    """A batch that knows whether its weights have been read: a module that does not would train on others."""

    read = False

    def __getitem__(self, key: str) -> Any:
        self.read = self.read or key == SAMPLE_WEIGHTS
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read = self.read or key == SAMPLE_WEIGHTS
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read = self.read or key == SAMPLE_WEIGHTS
        return super().pop(key, *default)

    def check_read(self) -> None:
        if not self.read:
            raise CannotChoose(
                f"training_step has not read the batch's {SAMPLE_WEIGHTS!r} [B], so samples would count alike; "
                f"multiply each sample's loss by it, or choose without weights"
            )


def select(batch: Any, chosen: Chosen) -> Any:
    """The rows `chosen` of every tensor and list in a batch that has a row for each sample; the rest stays.

    The batch is copied, not changed. Weights are put under "sample_weights", and multiplied where there are some. A
    "loss_weight", the batch's share of what a whole global batch is averaged over, becomes the share of what is left.
    """
    size = _rows(batch)
    if not size:
        raise CannotChoose(f"a {type(batch).__name__} has no samples that could be chosen: no tensor [B, …] is in it")
    rows: list[int] = []

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[chosen.rows.to(part.device)] if part.ndim and len(part) == size else part
        if isinstance(part, Mapping):
            return {key: cut(value) for key, value in part.items()}
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(cut, part))
        if isinstance(part, list) and len(part) == size and not _holds_tensors(part):
            rows[:] = rows or chosen.rows.tolist()
            return [part[row] for row in rows]
        if isinstance(part, list | tuple):
            return type(part)(map(cut, part))
        return part

    kept = cut(batch)
    if isinstance(batch, Mapping) and LOSS_WEIGHT in batch:
        kept[LOSS_WEIGHT] = batch[LOSS_WEIGHT] * _targets(kept) / _targets(batch) * (size / len(chosen.rows))
    if chosen.weights is None:
        return kept
    if not isinstance(batch, Mapping):
        raise CannotChoose(f"weights of samples need batches that are mappings; this one is a {type(batch).__name__}")
    before = kept.get(SAMPLE_WEIGHTS, 1.0)
    return _Weighted({**kept, SAMPLE_WEIGHTS: before * chosen.weights})


def _rows(batch: Any) -> int:
    """How many samples a batch has: the length of the first tensor [B, …] in it."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((size for part in parts if (size := _rows(part))), 0)


def _holds_tensors(part: list[Any]) -> bool:
    return any(isinstance(each, Tensor | Mapping | list | tuple) for each in part)


def _targets(batch: Mapping[str, Any]) -> Any:
    """How many targets a batch has."""
    labels = batch.get("labels")
    return (labels != _IGNORED).sum() if isinstance(labels, Tensor) else _rows(batch)


# -- in and out --------------------------------------------------------------------------------------------------------
def wrapped_step(module: pl.LightningModule) -> WrappedStep | None:
    """Return what stands in for the module's step; None where nobody has wrapped it."""
    wrapped = vars(module).get("training_step")
    return wrapped if isinstance(wrapped, WrappedStep) else None


def choose_samples(module: pl.LightningModule, chooser: SampleChooser) -> None:
    """Train only on the samples that `chooser` takes from each batch; several choose one after another.

    Args:
        module: Whose `training_step` then gets a smaller batch.
        chooser: Asked in every step. Where it weighs samples, the module's step must read "sample_weights".
    """
    _wrap(module).choosers.append(chooser)


def add_auxiliary_loss(module: pl.LightningModule, term: AuxiliaryLoss) -> None:
    """Add `term` to the loss that `module.training_step` returns.

    Raises:
        NoLoss: The module optimizes manually.
    """
    if not module.automatic_optimization:
        raise NoLoss(f"{type(module).__name__} optimizes manually, so its loss cannot be added to; return it instead")
    _wrap(module).terms.append(term)


def _wrap(module: pl.LightningModule) -> WrappedStep:
    wrapped = wrapped_step(module)
    if wrapped is None:
        wrapped = WrappedStep(module.training_step)
        module.training_step = wrapped  # type: ignore[assignment, method-assign]
    return wrapped


def remove_from_step(module: pl.LightningModule, technique: SampleChooser | AuxiliaryLoss) -> None:
    """Take a chooser or a term away again; harmless where it is not there."""
    if (wrapped := wrapped_step(module)) is None:
        return
    wrapped.choosers = [other for other in wrapped.choosers if other is not technique]
    wrapped.terms = [other for other in wrapped.terms if other is not technique]
    if wrapped.terms or wrapped.choosers:
        return
    bound = getattr(wrapped.plain, "__self__", None)
    if bound is not None and id(bound) == id(module):  # its own method, found on the class again
        del module.training_step
    else:
        module.training_step = wrapped.plain  # type: ignore[method-assign]
