"""A number for each sample of the training data, which ranks write where they train and read as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class SampleScores:
    """A table [N] keyed by a sample's index in the data set, cut into equal pieces, one a rank.

    Writing is local: nothing is sent and no device waited for until the table is read, which every rank must do at the
    same moment, such as the end of an epoch. Where a sample was written twice, the later call counts, then the higher
    rank. A technique returns its tables in `tables`, and checkpoints keep them, for any number of ranks.

    Args:
        initial: The number of samples that nobody has written.

    Example:
        >>> scores = SampleScores(initial=1.0)
        >>> scores.open(count=4)
        >>> scores.record([2, 0], torch.tensor([0.5, 0.25]))
        >>> scores.whole().tolist()
        [0.25, 1.0, 0.5, 1.0]
    """

    def __init__(self, initial: float = 0.0) -> None:
        self.initial = initial
        self.count = 0
        self._piece: Tensor | None = None  # this rank's, [length]
        self._written: list[tuple[Tensor, Tensor]] = []  # (indices [k], values [k]), not sent yet

    def open(self, count: int) -> None:
        """The data has `count` samples. Called in `on_fit_start`; what was loaded before stays."""
        self.count = count
        if self._piece is None:
            self._piece = torch.full((self.length,), self.initial)
        elif len(self._piece) == count != self.length:  # loaded whole, before it was known how many ranks there are
            self._piece = self._piece[self.offset : self.offset + self.length].clone()

    @property
    def offset(self) -> int:
        """Of this rank's piece."""
        return min(self.count, _rank() * -(-self.count // _world()))

    @property
    def length(self) -> int:
        """Of this rank's piece."""
        return min(-(-self.count // _world()), self.count - self.offset)

    def record(self, indices: Sequence[int], values: Tensor) -> None:
        """Write `values` [k] of the samples `indices`; see `GlobalBatches.drawn` for those of a batch."""
        self._written.append((torch.as_tensor(indices, dtype=torch.int64), values.detach().float().reshape(-1)))

    def share(self) -> Tensor:
        """Send what was written to the rank that keeps it; this rank's piece [length]. Collective."""
        assert self._piece is not None, "open the table first"
        mine = (
            torch.cat([torch.empty(0, dtype=torch.int64), *[indices for indices, _ in self._written]]),
            torch.cat([torch.empty(0), *[values.cpu() for _, values in self._written]]),
        )
        self._written.clear()
        everybodys = [mine]
        if _world() > 1:
            everybodys = [mine] * _world()
            dist.all_gather_object(everybodys, mine)
        for indices, values in everybodys:
            mine_too = (indices >= self.offset) & (indices < self.offset + self.length)
            # numpy's assignment, for where an index is repeated the last value counts
            self._piece.numpy()[(indices[mine_too] - self.offset).numpy()] = values[mine_too].numpy()
        return self._piece

    def whole(self) -> Tensor:
        """All numbers, [N], on the CPU: the same on every rank. Collective."""
        piece = self.share()
        if _world() == 1:
            return piece.clone()
        pieces = [piece] * _world()
        dist.all_gather_object(pieces, piece)
        return torch.cat(pieces)

    def load(self, piece: Tensor) -> None:
        """Take this rank's piece [length] of a saved table, or, before `open`, all of it [N]."""
        self._piece = piece.detach().float().cpu().clone()
        self._written.clear()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
