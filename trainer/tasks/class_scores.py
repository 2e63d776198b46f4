"""Precision, recall and F1 of classes, from how often each was wanted, predicted, and both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClassScores:
    """Counts of each class [K] in float64: right (predicted where it was wanted), predicted, wanted."""

    right: Tensor
    predicted: Tensor
    wanted: Tensor

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> ClassScores:
        """Of a confusion matrix [K, K] whose rows are what was wanted."""
        counts = matrix.double()
        return cls(counts.diagonal(), counts.sum(0), counts.sum(1))

    @classmethod
    def of_binary(cls, matrices: Tensor) -> ClassScores:
        """Of a confusion matrix [2, 2] for each class [K, 2, 2]: not wanted or wanted, not predicted or predicted."""
        counts = matrices.double()
        return cls(counts[:, 1, 1], counts[:, :, 1].sum(1), counts[:, 1].sum(1))

    @property
    def accuracy(self) -> Tensor:
        """The share of what was wanted that is right []."""
        return _ratio(self.right.sum(), self.wanted.sum())

    @property
    def micro_f1(self) -> Tensor:
        """F1 of all classes' counts together []."""
        return _ratio(2 * self.right.sum(), (self.predicted + self.wanted).sum())

    @property
    def macro_f1(self) -> Tensor:
        """The mean F1 [] of all classes that occur, wanted or predicted."""
        occurs = self.predicted + self.wanted > 0
        return _ratio(self._f1.sum(), occurs.sum().double())

    @property
    def _f1(self) -> Tensor:
        return _ratio(2 * self.right, self.predicted + self.wanted)

    def table(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """`precision`, `recall` and `f1` by the name of the class, and in how many `samples` it was wanted."""
        columns = {
            "precision": _ratio(self.right, self.predicted), "recall": _ratio(self.right, self.wanted), "f1": self._f1,
            "samples": self.wanted,
        }  # fmt: skip
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Their quotient, 0 where there is nothing."""
    return part / whole.clamp(min=1)
