"""What preferences are measured against: the model that training began with.

With an adapter that is the base without it, which is asked in every step. Where all weights train, its
log-probabilities are computed once, before the first step: the time is the run's own, of its start. They are kept in
the run's folder, for a run that goes on has other weights by then.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ...files import replace_file
from ..data.errors import TaskError

if TYPE_CHECKING:
    from ..data.preferences import Preferences

FILE = "reference.npz"  # in a run's folder
SAMPLES = 8  # of a batch, where nobody says how many


@contextmanager
def frozen_reference(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, its dropout off and nothing kept for a backward pass.

    PEFT's own `disable_adapter` also makes weights stop and start to train, and DDP and ZeRO have made plans for these.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    for layer in adapted:
        layer._disable_adapters = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in adapted:
            layer._disable_adapters = False
        for part, training in modes:
            part.training = training


class CachedReference:
    """Log-probabilities under the first weights, of all documents of some data sets, computed once for a run.

    Args:
        sets: The data sets, by name; each gets its `reference`.
        home: The run's folder.
        key: Equal exactly when the data and their tokens are.
    """

    __slots__ = ("home", "key", "sets")  # no `__dict__`, through which data would be copied with a module's state

    def __init__(self, sets: dict[str, Preferences], home: Path, key: str) -> None:
        self.sets, self.home, self.key = sets, home, key

    @property
    def is_there(self) -> bool:
        """Whether the data sets have theirs."""
        return all(data.reference is not None for data in self.sets.values())

    def prepare(
        self, trainer: pl.Trainer, log_probabilities: Callable[[Sequence[dict[str, Tensor]]], Tensor], *, begun: bool
    ) -> None:
        """Give the data sets their references: those that are kept, or those of the model as it is now.

        Every rank must call it. Batches are the same on any number of ranks, which share them out.

        Args:
            trainer: Whose ranks take part.
            log_probabilities: Of documents: samples of [t] -> [B].
            begun: Whether the weights have been trained already.

        Raises:
            TaskError: They have, and nothing is kept of what they were.
        """
        strategy = trainer.strategy
        kept = strategy.broadcast(self._kept() if trainer.is_global_zero else None)
        if kept is None and begun:
            raise TaskError(
                f"{self.home} has no {FILE} of these data, which this run was to be measured against, and its weights "
                "are others by now. Begin in another run directory."
            )
        if kept is None:
            size = getattr(trainer.datamodule, "micro_batch_size", SAMPLES)  # type: ignore[attr-defined]
            computed = {name: _computed(trainer, data, log_probabilities, size) for name, data in self.sets.items()}
            kept = {name: values.cpu().numpy() for name, values in computed.items()}
            if trainer.is_global_zero:
                self._keep(kept)
        for name, data in self.sets.items():
            data.reference = torch.from_numpy(kept[name])

    def _kept(self) -> dict[str, np.ndarray] | None:
        try:
            with np.load(self.home / FILE, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
        except (OSError, ValueError):
            return None
        return values if str(values.pop("key", "")) == self.key else None

    def _keep(self, values: dict[str, np.ndarray]) -> None:
        written = io.BytesIO()
        np.savez(written, key=np.array(self.key), **values)  # type: ignore[arg-type]
        self.home.mkdir(parents=True, exist_ok=True)
        replace_file(self.home / FILE, written.getvalue())


def _computed(
    trainer: pl.Trainer, data: Preferences, log_probabilities: Callable[[Any], Tensor], size: int
) -> Tensor:  # fmt: skip
    """The log-probabilities of both documents of each sample [N, 2], on every rank alike."""
    order = np.argsort(-data.token_counts, kind="stable")
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    values = torch.zeros(len(data), 2, device=trainer.strategy.root_device)
    rank, world = trainer.global_rank, trainer.world_size
    for number in range(rank, -(-len(batches) // world) * world, world):  # equally many on each, as ZeRO-3 needs
        batch = batches[number % len(batches)].tolist()
        documents = [data.document(index, which) for index in batch for which in (0, 1)]
        pairs = log_probabilities(documents).view(-1, 2).float()
        if number < len(batches):
            values[batch] = pairs
    return trainer.strategy.reduce(values, reduce_op="sum")  # type: ignore[return-value]
