"""What is wrong with a recipe, said so that it can be mended: where, which key, what was found, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from .. import ShoestringError

SHOWN = 60  # characters of a found value that a message repeats


@dataclass(frozen=True)
class Problem:
    """One mistake of one recipe.

    `where` is `file:line` or `override "key=value"`; `key` is the dotted path (empty for the file as a whole);
    `found` is the value in the user's spelling; `allowed` the rule; `hint` the way out, or empty.
    """

    where: str
    key: str
    found: str
    allowed: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: {self.key}" if self.key else self.where
        text = f"{place}: found {self.found}; allowed: {self.allowed}" + (f"; {self.hint}" if self.hint else "")
        # what a file says goes to a terminal: no escape sequences, no line breaks
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class RecipeError(ShoestringError):
    """A recipe that cannot be run. `problems` holds every mistake that was found, one line of the message each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def clip(text: str) -> str:
    """One line of at most `SHOWN` characters, as a message repeats a value."""
    line = " ".join(text[: SHOWN * 10].split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be, or None when none is near (one edit in three letters)."""
    scored = [(distance(word.lower(), choice.lower()), -_alike(word, choice), choice) for choice in choices]
    near = [score for score in scored if score[0] <= _edits(max(len(word), len(score[2])))]
    return min(near)[2] if near else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The hint `did you mean X?`, or an empty string."""
    match = nearest(word, choices)
    return f"did you mean {match}?" if match else ""


def distance(one: str, other: str) -> int:
    """Edits from one word to the other: insert, delete, replace, swap two neighbours (optimal string alignment)."""
    if abs(len(one) - len(other)) > SHOWN:  # far apart, and not worth a table of a pasted page
        return SHOWN
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


def _edits(length: int) -> int:
    return min(max(1, length // 3), length - 1)  # never every letter


def _alike(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
