"""Did you mean …? The one answer to a misspelt name, whoever asks.

`distance` counts the edits between two words; `nearest` finds the word that was probably meant; `did_you_mean` makes a
sentence of it. Nothing is suggested that is more than one edit in three letters away: a wrong guess costs the reader
more than none.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

LONGEST = 60  # words whose lengths differ by more are far apart, and not worth a table of a pasted page


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The hint `did you mean X?`, or an empty string where nothing is near.

    Args:
        word: What was written.
        choices: What could have been meant.
    """
    match = nearest(word, choices)
    return f"did you mean {match}?" if match else ""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be, or None when none is near (one edit in three letters)."""
    near = all_near(word, choices)
    return near[0] if near else None


def all_near(word: str, choices: Iterable[str]) -> list[str]:
    """The choices that `word` may have been meant to be, the likeliest first.

    Of several as many edits away, the one that shares most letters in their order comes first.
    """
    scored = [(distance(word.lower(), choice.lower()), -_similarity(word, choice), choice) for choice in choices]
    return [choice for edits, _, choice in sorted(scored) if edits <= _allowed(max(len(word), len(choice)))]


def most_similar(word: str, choices: Iterable[str]) -> str | None:
    """The choice that shares most letters with `word`, however few: for patterns, which are never a whole name."""
    return max(sorted(choices), key=lambda choice: _similarity(word, choice), default=None)


def distance(one: str, other: str) -> int:
    """Edits from one word to the other: insert, delete, replace, swap two neighbours (optimal string alignment)."""
    if abs(len(one) - len(other)) > LONGEST:
        return LONGEST
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def _allowed(length: int) -> int:
    return min(max(1, length // 3), length - 1)  # never every letter


def _similarity(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
