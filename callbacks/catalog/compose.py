"""Order techniques, or refuse them: from their cards alone, before anything is spent.

The order is a topological sort: who writes a part acts before who reads it, ties go by name, so the result does not
depend on the order in the recipe. Two writers of one part need a rule in `INTERACTIONS`; without one they are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from itertools import product

from ..contract import IncompatibleTechniques, Technique
from .interactions import INTERACTIONS, Rule

_OF_STEPS = frozenset({"gradients", "optimizer"})


@dataclass(frozen=True)
class Composition:
    """Techniques in the order their hooks run, and what to tell the user."""

    techniques: tuple[Technique, ...]
    warnings: tuple[str, ...]
    reasons: tuple[str, ...]


def compose(
    techniques: Iterable[Technique], facts: Iterable[str] = (), rules: Sequence[Rule] = INTERACTIONS
) -> Composition:
    """Check techniques against one another and this run, and put them in the order in which they act.

    Args:
        techniques: In any order: the result does not depend on it.
        facts: What is true of the run, such as "cuda", "bf16", "zero-3", "adamw".
        rules: What is known of pairs of techniques.

    Returns:
        The techniques in order, with warnings and the reasons for the order.

    Raises:
        IncompatibleTechniques: An unmet need, a refused fact, a duplicate, two writers of one part without a rule, or a
            cycle.
        Misconfigured: A setting is outside its range.

    Example:
        >>> from shoestring.callbacks import LRSchedule, RigL, compose
        >>> [technique.card.name for technique in compose([RigL(), LRSchedule()], {"cpu"}).techniques]
        ['lr_schedule', 'rigl']
    """
    known = frozenset(facts)
    by_name: dict[str, Technique] = {}
    for technique in sorted(techniques, key=lambda each: each.card.name):  # so errors do not depend on the input either
        technique.check()
        _fits(technique, known)
        if technique.card.name in by_name:
            raise IncompatibleTechniques(f"{technique.card.name} is given twice. Keep one.")
        by_name[technique.card.name] = technique
    pairs = [
        (first, second, rule)
        for rule in rules
        for first, second in product(rule.first, rule.second)
        if first in by_name and second in by_name
    ]
    for first, second, rule in pairs:
        if rule.verdict == "refuse":
            raise IncompatibleTechniques(
                f"{first} and {second} do not go together: {rule.why} ({rule.source}). {rule.fix}"
            )
    before = _arrows(by_name, [(first, second) for first, second, _ in pairs])
    return Composition(
        techniques=tuple(by_name[name] for name in _sorted(before)),
        warnings=tuple(
            f"{first} with {second}: {rule.why} ({rule.source}). Fix: {rule.fix}."
            for first, second, rule in pairs
            if rule.verdict == "warn"
        ),
        reasons=tuple(
            f"{first} before {second}: {rule.why}" for first, second, rule in pairs if rule.verdict == "order"
        ),
    )


def _fits(technique: Technique, facts: frozenset[str]) -> None:
    card = technique.card
    if unmet := technique.needs() - facts:
        raise IncompatibleTechniques(
            f"{technique!r} needs {_list(unmet)}, but this run has {_list(facts)}. Drop it or change the run."
        )
    if "step-in-backward" in facts and (card.writes | card.reads & _OF_STEPS) & (_OF_STEPS | {"modules"}):
        raise IncompatibleTechniques(
            f"{card.name} reads or changes whole gradients, states or modules, and a step in backward "
            "(optimizer.in_backward) has one gradient at a time. Drop one of them."
        )
    if "nvme" in facts and (card.writes | card.reads) & (_OF_STEPS | {"weights"}):
        raise IncompatibleTechniques(
            f"{card.name} reads or changes masters, gradients or states, and with strategy.nvme they lie on a drive, a "
            "few in memory at a time. Drop one of them."
        )
    if refused := card.refuses & facts:
        raise IncompatibleTechniques(f"{card.name} does not work with {_list(refused)}. Drop one of them.")


def _arrows(by_name: dict[str, Technique], ordered: Sequence[tuple[str, str]]) -> dict[str, set[str]]:
    """name -> names that act before it."""
    before: dict[str, set[str]] = {name: set() for name in by_name}
    ruled = {frozenset(pair) for pair in ordered}
    for first, second in ordered:
        before[second].add(first)
    for name, technique in by_name.items():
        for other, rival in by_name.items():
            if name == other or frozenset((name, other)) in ruled:
                continue
            if both := technique.card.writes & rival.card.writes:
                a, b = sorted((name, other))
                raise IncompatibleTechniques(f"{a} and {b} both write {_list(both)}. Keep one.")
            if technique.card.writes & (rival.card.reads - rival.card.writes):
                before[other].add(name)
    return before


def _sorted(before: dict[str, set[str]]) -> list[str]:
    sorter = TopologicalSorter(before)
    try:
        sorter.prepare()
    except CycleError as error:
        raise IncompatibleTechniques(
            f"no order works for {' -> '.join(error.args[1])}: each must act before the next."
        ) from None
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
