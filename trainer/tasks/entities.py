"""Entities in tagged words: spans of B-X and I-X, as the CoNLL-2003 task has them (Tjong Kim Sang, De Meulder 2003)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# its kind, the number of its first word, and of the word after its last
Entity = tuple[str, int, int]


def are_entity_tags(classes: Iterable[str]) -> bool:
    """Whether classes are O, B-X and I-X, and nothing else."""
    return all(name == "O" or name[:2] in ("B-", "I-") for name in classes)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a row of tags. An I-X that goes on with no X begins one, as in the task's own scoring."""
    spans: set[Entity] = set()
    kind, start = "", 0
    for at, tag in enumerate([*tags, "O"]):
        inside, _, name = tag.partition("-")
        if kind and (inside != "I" or name != kind):
            spans.add((kind, start, at))
            kind = ""
        if tag != "O" and not kind:
            kind, start = name, at
    return spans
