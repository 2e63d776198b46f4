"""Figures made from measured figures: Pareto fronts, what pruned parameters are worth, who is forgotten. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, quality) that no other beats: none has less or equal cost and more or equal quality,
    one of them strictly. Ordered by cost; of equal points all stay."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def pruned_parameter_efficiency(
    accuracy: float, dense_accuracy: float, nonzero: float, dense_parameters: float
) -> float | None:
    """(accuracy / dense accuracy) / (non-zero / dense parameters): 1 for the dense model itself.

    A formula of ours, labelled so wherever it is printed. A ratio: it rewards extreme sparsity at useless accuracy (a
    model at chance with 2 % of the weights may score 16), so read it beside the Pareto front, never alone. None where
    it would divide by nothing.
    """
    if dense_accuracy <= 0 or nonzero <= 0 or dense_parameters <= 0:
        return None
    return (accuracy / dense_accuracy) / (nonzero / dense_parameters)


def parameter_slack(
    points: Sequence[tuple[float, float]], dense_accuracy: float, dense_parameters: float, keep: float = 0.99
) -> float | None:
    """1 - the fewest non-zero parameters that keep 99 % of the dense accuracy / dense parameters; of ours, too.

    points: (non-zero parameters, accuracy) of every model tried. None where none of them keeps it.
    """
    enough = [nonzero for nonzero, accuracy in points if accuracy >= keep * dense_accuracy]
    return 1 - min(enough) / dense_parameters if enough else None


def forgotten(recall: Mapping[str, float], baseline: Mapping[str, float], most: int = 5) -> list[tuple[str, float]]:
    """The classes that lost most recall against a baseline, (name, loss), the worst first; only those that lost."""
    lost = {name: baseline[name] - recall[name] for name in recall.keys() & baseline.keys()}
    return sorted(((name, loss) for name, loss in lost.items() if loss > 0), key=lambda item: (-item[1], item[0]))[
        :most
    ]
