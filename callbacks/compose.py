"""Order techniques, or refuse them: from their cards alone, before anything is spent.

The order is a topological sort: who writes a part acts before who reads it, ties go by name, so the result does not
depend on the order in the recipe. Two writers of one part need a rule in `INTERACTIONS`; without one they are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from typing import Literal

from .contract import Technique, Unfit


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is known about two techniques together, with its source."""

    first: str
    second: str
    verdict: Literal["order", "warn", "refuse"]  # "order" and "warn" both let `first` act before `second`
    why: str
    source: str
    mend: str = ""


PRUNING = (
    "gradual_pruning",
    "set",
    "rigl",
    "top_kast",
    "movement_pruning",
    "n_m",
    "snip",
    "grasp",
    "synflow",
    "lottery_ticket",
)  # techniques that set weights to zero

INTERACTIONS: tuple[Rule, ...] = (
    Rule(
        first="lr_scaling",
        second="lr_schedule",
        verdict="order",
        why="the schedule multiplies the learning rate that the scaling rule has set",
        source="arXiv 1706.02677 §2.2",
    ),
    *(
        Rule(
            first=pruning,
            second="weight_averaging",
            verdict="order",
            why="averages are taken of masked weights; a weight pruned to zero is zero in the average too",
            source="arXiv 1710.01878",
        )
        for pruning in PRUNING
    Rule(
        first="structured_pruning",
        second="gradual_pruning",
        verdict="order",
        why="structure before sparsity: masks are cut with the weights, so the share of zeros is then of what is left",
        source="arXiv 2301.12900",
    ),
    Rule(
        first="structured_pruning",
        second="weight_averaging",
        verdict="order",
        why="averages are cut with the weights, and go on from there",
        source="arXiv 2301.12900",
    ),
    Rule(
        first="structured_pruning",
        second="gradient_checkpointing",
        verdict="order",
        why="blocks recompute whatever is left of them",
        source="arXiv 1604.06174",
    ),
    Rule(
        first="gradual_pruning",
        second="weight_averaging",
        verdict="order",
        why="averages are taken of masked weights; a weight pruned to zero is zero in the average too",
        source="arXiv 1710.01878",
    ),
    Rule(
        first="competence_curriculum",
        second="lr_schedule",
        verdict="warn",
        why="gains of a data curriculum shrink under a decaying learning rate",
        source="arXiv 2511.18903",
        mend="add weight_averaging, which restores them, or use the wsd schedule",
    ),
    Rule(
        first="distillation",
        second="early_exit",
        verdict="order",
        why="each adds a term of its own to the loss of one forward; exits learn from labels, the last layer from both",
        source="arXiv 1503.02531 §2, 2404.16710 §4.1",
    ),
    Rule(
        first="gradient_checkpointing",
        second="early_exit",
        verdict="order",
        why="exits replay what a block returned, so a block is recomputed once in backward, however many exits it has",
        source="arXiv 1604.06174",
    ),
    Rule(
        first="sequence_length_warmup",
        second="lr_scaling",
        verdict="order",
        why="short sequences early keep large batches with large learning rates stable",
        source="arXiv 2108.06084",
    ),
    # structure, then sparsity, then quantization
    Rule(
        first="low_rank",
        second="gradual_pruning",
        verdict="warn",
        why="the factors are pruned, and their product is dense again",
        source="arXiv 2103.03936",
        mend="use the factors of final.safetensors, or keep_factors",
    ),
    Rule(
        first="low_rank",
        second="weight_averaging",
        verdict="order",
        why="what is averaged are the factors",
        source="arXiv 2103.03936",
    ),
    Rule(
        first="low_rank",
        second="weight_clustering",
        verdict="warn",
        why="the factors share a few values, and their product does not",
        source="arXiv 2103.03936",
        mend="use the factors of final.safetensors, or keep_factors",
    ),
    Rule(
        first="gradual_pruning",
        second="weight_clustering",
        verdict="order",
        why="what is left after pruning is clustered, and keep_zero leaves the zeros as they are",
        source="arXiv 1510.00149",
    ),
    Rule(
        first="weight_averaging",
        second="weight_clustering",
        verdict="order",
        why="a mean of shared values is not shared: the average is clustered at the end",
        source="arXiv 1510.00149",
    Rule(
        first="gradual_pruning",
        second="quantization_aware",
        verdict="order",
        why="prune before quantizing: the grid is laid over the weights that remain, and zeros are one of its levels",
        source="arXiv 1510.00149",
    ),
    Rule(
        first="mixed_precision",
        second="quantization_aware",
        verdict="order",
        why="weights are put on their grid first and cast to 16 bits as they enter the matrix product",
        source="torch.amp: autocast casts the inputs of each product",
    ),
)


@dataclass(frozen=True)
class Composition:
    """Techniques in the order their hooks run, and what to tell the user."""

    techniques: tuple[Technique, ...]
    warnings: tuple[str, ...]
    reasons: tuple[str, ...]


def compose(
    techniques: Iterable[Technique], facts: Iterable[str] = (), rules: Sequence[Rule] = INTERACTIONS
) -> Composition:
    """Check and order `techniques` for a run with these `facts` ("cuda", "bf16", "zero-3", "adamw", …).

    Raises `Unfit` on an unmet need, a refused fact, a duplicate, two writers without a rule, or a cycle.
    """
    known = frozenset(facts)
    by_name: dict[str, Technique] = {}
    for technique in sorted(techniques, key=lambda each: each.card.name):  # so errors do not depend on the input either
        technique.check()
        _fits(technique, known)
        if technique.card.name in by_name:
            raise Unfit(f"{technique.card.name} is given twice. Keep one.")
        by_name[technique.card.name] = technique
    applicable = [rule for rule in rules if rule.first in by_name and rule.second in by_name]
    for rule in applicable:
        if rule.verdict == "refuse":
            raise Unfit(f"{rule.first} and {rule.second} do not go together: {rule.why} ({rule.source}). {rule.mend}")
    before = _arrows(by_name, applicable)
    return Composition(
        techniques=tuple(by_name[name] for name in _sorted(before)),
        warnings=tuple(
            f"{rule.first} with {rule.second}: {rule.why} ({rule.source}). Mend: {rule.mend}."
            for rule in applicable
            if rule.verdict == "warn"
        ),
        reasons=tuple(
            f"{rule.first} before {rule.second}: {rule.why}" for rule in applicable if rule.verdict == "order"
        ),
    )


def _fits(technique: Technique, facts: frozenset[str]) -> None:
    card = technique.card
    if unmet := technique.needs() - facts:
        raise Unfit(f"{technique!r} needs {_list(unmet)}, and this run has {_list(facts)}. Drop it or change the run.")
    if refused := card.refuses & facts:
        raise Unfit(f"{card.name} does not work with {_list(refused)}. Drop one of them.")


def _arrows(by_name: dict[str, Technique], rules: Sequence[Rule]) -> dict[str, set[str]]:
    """name -> names that act before it."""
    before: dict[str, set[str]] = {name: set() for name in by_name}
    ruled = {frozenset((rule.first, rule.second)) for rule in rules}
    for rule in rules:
        before[rule.second].add(rule.first)
    for name, technique in by_name.items():
        for other, rival in by_name.items():
            if name == other or frozenset((name, other)) in ruled:
                continue
            if both := technique.card.writes & rival.card.writes:
                a, b = sorted((name, other))
                raise Unfit(f"{a} and {b} both write {_list(both)}. Keep one.")
            if technique.card.writes & (rival.card.reads - rival.card.writes):
                before[other].add(name)
    return before


def _sorted(before: dict[str, set[str]]) -> list[str]:
    sorter = TopologicalSorter(before)
    try:
        sorter.prepare()
    except CycleError as error:
        raise Unfit(f"no order works for {' -> '.join(error.args[1])}: each must act before the next.") from None
    order: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heappush(ready, name)
        name = heappop(ready)  # by name, so ties never depend on the order of the input
        order.append(name)
        sorter.done(name)
    return order


def _list(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "nothing special"
