"""The table of classes and the confusion matrix, as `train` shows them in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = 60  # classes


def show_classes(details: Mapping[str, Any], console: Console) -> None:
    """Of an evaluation's details, what is of classes. What has more than `SHOWN` of them is in the report alone."""
    classes: Mapping[str, Mapping[str, float]] = details.get("classes", {})
    if not classes:
        return
    if len(classes) > SHOWN:
        console.print(f"{len(classes)} classes: their table is in report.json")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("class", overflow="fold")
    for name in ("precision", "recall", "f1", "samples"):
        table.add_column(name, justify="right")
    for name, row in classes.items():
        scores = [f"{row[column]:.3f}" for column in ("precision", "recall", "f1")]
        table.add_row(name, *scores, f"{row['samples']:,.0f}")
    console.print(table)
    if matrix := details.get("confusion_matrix"):
        console.print("confusion matrix: a row for each class as labelled, a column for each as predicted")
        for line in matrix_lines(list(classes), matrix):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def matrix_lines(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[str]:
    """A confusion matrix as lines of text; a dot is a 0. Columns are as wide as what is in them."""
    cells = [[str(count) if count else "." for count in row] for row in matrix]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    longest = max(map(len, names))
    return [
        f"{name:<{longest}}  {' '.join(f'{cell:>{width}}' for cell, width in zip(row, widths, strict=True))}"
        for name, row in zip(names, cells, strict=True)
    ]
