"""What is predicted of a row: its label column, read and checked, and then as the numbers that a loss takes.

A label is kept as one text in canonical form: a class's name; of several classes a JSON list of names, sorted; a
number; of words a JSON list with one class each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from ...problems import clip
from .errors import BadRow, TaskError
from .rows import Place, kind_of

if TYPE_CHECKING:
    import torch

Kind = Literal["single-label", "multi-label", "regression", "words"]
FEW_CLASSES = 20  # so many different labels may each have one row, or be numbers with fractions


def read_label(kind: Kind, place: Place, row: Mapping[str, Any], column: str) -> str:
    """The label of a row in canonical form; raises `BadRow` where there is none, or it is no label of its kind."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"data.label_column {column!r}: {place} has no label.", "without a label")
    return _READERS[kind](place, value, column)


def _class(place: Place, value: Any, column: str) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # 1.0 and 1 are one class
    if isinstance(value, str | int | float):
        return str(value)
    hint = " Several of a row need model.problem: multi-label." if isinstance(value, list) else ""
    raise BadRow(f"{_described(place, value, column)}; a class is a text or a whole number.{hint}", "label is no class")


def _classes(place: Place, value: Any, column: str) -> str:
    """A list, or a text: of JSON, or of names between commas. None at all is a label, too."""
    names = value
    if isinstance(value, str):
        names = _json_list(value) or [name.strip() for name in value.split(",") if name.strip()]
    if not isinstance(names, list):
        raise BadRow(
            f'{_described(place, value, column)}; classes are a list, or a text such as "a, b".', "label is no list"
        )
    return json.dumps(sorted({_class(place, name, column) for name in names}), ensure_ascii=False)


def _words(place: Place, value: Any, column: str) -> str:
    names = _json_list(value) if isinstance(value, str) else value
    if not isinstance(names, list):
        description = _described(place, value, column)
        raise BadRow(f"{description}; a list with one class for each word is needed.", "label is no list")
    return json.dumps([_class(place, name, column) for name in names], ensure_ascii=False)


def _number(place: Place, value: Any, column: str) -> str:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(
            f"{_described(place, value, column)}; model.problem: regression needs a number.", "label is no number"
        )
    return repr(number)


_READERS: dict[str, Callable[[Place, Any, str], str]] = {
    "single-label": _class, "multi-label": _classes, "regression": _number, "words": _words,
}  # fmt: skip


def _described(place: Place, value: Any, column: str) -> str:
    return f"data.label_column {column!r}: {place} is {kind_of(value)}, found {clip(str(value))}"


def _json_list(text: str) -> list[Any] | None:
    """The list that a text spells as JSON; None where it spells none."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, list) else None


def check_classes(classes: Mapping[str, Place], count: int, column: str) -> None:
    """Refuse a column of numbers to be predicted, or of names that hardly repeat."""
    if len(classes) <= FEW_CLASSES:
        return
    fraction = next((name for name in classes if is_number(name) and not float(name).is_integer()), None)
    if fraction is not None and all(map(is_number, classes)):
        raise TaskError(
            f"data.label_column {column!r} has {len(classes)} different numbers, such as {fraction} in "
            f"{classes[fraction]}; classification needs classes. To predict numbers, set model.problem: regression."
        )
    if 2 * len(classes) > count:
        raise TaskError(
            f"data.label_column {column!r} has {len(classes)} different labels in {count} rows, such as "
            f"{next(iter(classes))!r} in {next(iter(classes.values()))}; a class needs several rows."
        )


def check_words(place: Place, text: str, label: str) -> None:
    """Raise `BadRow` where a row has not as many classes as words."""
    words, classes = len(text.split(" ")), len(json.loads(label))
    if words != classes:
        raise BadRow(
            f"data.source: {place} has {words} words and {classes} labels; each word needs one.", "words without labels"
        )


# -- as numbers --------------------------------------------------------------------------------------------------------
def class_names(
    kind: Kind, train: Sequence[Any], held: Sequence[Any], places: Mapping[str, str] | None = None
) -> list[str] | None:
    """The classes of training data in sorted order; numbers sort as numbers, everything else as text.

    places: where a class of `held` stands first, as far as that is known. None for regression. Raises `TaskError` where
    there are fewer than two, or `held` has others.
    """
    if kind == "regression":
        return None
    known = set(_each(kind, train))
    ordered = sorted(known, key=float if all(map(is_number, known)) else str)
    if len(ordered) < 2:
        raise TaskError(f"data.label_column: classification needs two classes or more, found {ordered}.")
    if new := sorted(map(str, set(_each(kind, held)) - known)):
        first = f" ({new[0]!r} in {places[new[0]]})" if places and new[0] in places else ""
        raise TaskError(
            f"data.validation has classes that training data lacks: {new}{first}. Give training rows of each, or take "
            "these out."
        )
    return [str(name) for name in ordered]


def targets(kind: Kind, labels: Sequence[Any], names: Sequence[str] | None) -> torch.Tensor:
    """Labels as numbers: classes [N] int64, several of them [N, classes] of 0 and 1, numbers [N] float32."""
    import torch

    if names is None:
        return torch.tensor([float(label) for label in labels])
    numbers = {name: number for number, name in enumerate(names)}
    if kind == "single-label":
        return torch.tensor([numbers[str(label)] for label in labels], dtype=torch.int64)
    held = torch.zeros(len(labels), len(names))
    for row, label in enumerate(labels):
        held[row, [numbers[name] for name in json.loads(label)]] = 1.0
    return held


def class_weights(wanted: str | Sequence[float] | None, labels: torch.Tensor, names: Sequence[str]) -> Any:
    """The factor of each class's losses [classes], whose mean over the samples is 1; None: all weigh alike.

    wanted: "balanced" (a class with half as many samples weighs twice as much), or a weight for each class. labels: of
    the training samples [N]. A factor belongs to a sample, whatever else is in its batch: so losses are the same over
    any cut into micro-batches and ranks. Raises `TaskError` where they are not as many as there are classes.
    """
    if wanted is None:
        return None
    import torch

    counts = torch.bincount(labels, minlength=len(names)).double()
    weights = 1 / counts.clamp(min=1) if isinstance(wanted, str) else torch.tensor(wanted, dtype=torch.float64)
    if len(weights) != len(names):
        raise TaskError(
            f"model.class_weights: found {len(weights)} weights; the data has {len(names)} classes, in this order: "
            f"{clip(', '.join(names))}."
        )
    return (weights / (weights * counts).sum() * counts.sum()).float()


def labels_of(data: Any) -> torch.Tensor:
    """The classes [N] of a data set's samples: what it keeps as `labels`, else what each sample has."""
    import torch

    kept = getattr(data, "labels", None)
    return torch.as_tensor(kept if kept is not None else [int(data[i]["labels"]) for i in range(len(data))])


def _each(kind: Kind, labels: Iterable[Any]) -> Iterable[Any]:
    """Every class that occurs in labels."""
    return labels if kind == "single-label" else chain.from_iterable(map(json.loads, labels))


def is_number(label: Any) -> bool:
    """Whether it is a finite number, or the text of one."""
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError):
        return False
