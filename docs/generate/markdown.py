"""The few pieces of Markdown that the generated pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def cell(text: object) -> str:
    """`text` on one line, with nothing in it that would end a table's cell or start an HTML tag."""
    return " ".join(str(text).split()).replace("|", r"\|").replace("<", "&lt;")


def code(text: object) -> str:
    """`text` as it is typed, for a table."""
    return f"`{' '.join(str(text).split())}`".replace("|", r"\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every cell is Markdown already (`cell`, `code`)."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def directive(name: str, argument: str, *options: str) -> str:
    """A reStructuredText directive, for what Sphinx documents from the code itself."""
    lines = [f".. {name}:: {argument}", *(f"   {option}" for option in options)]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def page(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
