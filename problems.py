"""What is wrong with a file of the user's, said so that it can be fixed: where, which key, what, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import ShoestringError

SHOWN = 60  # characters of a found value that a message repeats


@dataclass(frozen=True)
class Problem:
    """One mistake of one file.

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


class Malformed(ShoestringError):
    """A file that cannot be used. `problems` holds every mistake that was found, one line of the message each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def clip(text: str) -> str:
    """One line of at most `SHOWN` characters, as a message repeats a value."""
    line = " ".join(text[: SHOWN * 10].split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
