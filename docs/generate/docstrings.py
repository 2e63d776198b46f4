"""Docstrings as they are written here, made into reStructuredText before napoleon reads their sections.

The code's docstrings are plain text: `code` in single backticks, settings as `name: meaning`, and what must keep its
line breaks indented. reStructuredText would read stars, bars and underscores in them as markup.
"""

from __future__ import annotations

import re
from collections.abc import Set
from itertools import groupby

SECTION = re.compile(
    r"^(Args|Arguments|Attributes|Example|Examples|Keyword Args|Note|Notes|Raises|References|Returns|See Also|Warning|"
    r"Warnings|Warns|Yields|Source|Sources):\s*$"
)
SETTING = re.compile(r"^([\w`,* ]{1,80}?): +(\S.*)$")
LITERAL = re.compile(r"(``[^`]+``|:[\w:]+:`[^`]+`|`[^`]+`_{0,2})")


def rendered(lines: list[str], parameters: Set[str] = frozenset()) -> list[str]:
    """The docstring's lines, as reStructuredText. `parameters`: names that begin an item of a list of settings."""
    blocks = [list(block) for empty, block in groupby(lines, key=lambda line: not line.strip()) if not empty]
    out: list[str] = []
    section = ""
    for block in blocks:
        if match := SECTION.match(block[0]):
            section = match[1]
            out += [block[0], *_in_section(section, block[1:]), ""]
        elif section and block[0].startswith(" "):  # goes on with what the section's name began
            out += [*_in_section(section, block), ""]
        else:
            section = ""
            out += [*_paragraph(block, block[0].startswith(" "), parameters), ""]
    return out


def _in_section(section: str, block: list[str]) -> list[str]:
    """Lines of a section, which napoleon reads on; an example's lines are code, whether it has prompts or not."""
    if not section.startswith("Example"):
        return [inline(line) for line in block]
    if not block or block[0].lstrip().startswith((">>>", "..", "::")):
        return block
    return ["    ::", "", *(f"    {line}" for line in block)]


def _paragraph(block: list[str], indented: bool, parameters: Set[str]) -> list[str]:
    if block[0].startswith((">>>", "..")):
        return block
    if items := _settings(block, parameters):
        return items
    if indented or _columns(block):
        return ["::", "", *(f"   {line}" for line in block)]
    if any(line.startswith(" ") for line in block):
        return _opened(block, parameters)
    return [inline(line) for line in block]


def _columns(block: list[str]) -> bool:
    """Whether names stand in a first column and their meaning in a second."""
    return sum(bool(re.match(r"^\S.{0,40}\S {2,}\S", line)) for line in block) * 2 > len(block)


def _settings(block: list[str], parameters: Set[str]) -> list[str]:
    """Lines that begin with `name: ` of a parameter, and those that go on with it, as a list; else empty."""
    items: list[str] = []
    for line in block:
        match = SETTING.match(line)
        names = re.findall(r"\w+", match[1]) if match else []
        if match and names and set(names) <= parameters:
            items.append(f"**{', '.join(names)}**: {inline(match[2])}")
        elif items:
            items[-1] += " " + inline(line.strip())
        else:
            return []
    return [f"- {item}" for item in items]


def _opened(block: list[str], parameters: Set[str]) -> list[str]:
    """A paragraph whose later lines are indented: the indented ones keep their line breaks."""
    start = next(number for number, line in enumerate(block) if line.startswith(" "))
    end = next((n for n in range(start, len(block)) if not block[n].startswith(" ")), len(block))
    rest = _paragraph(block[end:], False, parameters) if end < len(block) else []
    return [*map(inline, block[:start]), "", "::", "", *(f"   {line}" for line in block[start:end]), "", *rest]


def inline(line: str) -> str:
    """Code in double backticks; what reStructuredText would take for markup is escaped."""
    parts = LITERAL.split(line)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            escaped = re.sub(r"([*|`])", r"\\\1", part)
            parts[number] = re.sub(r"(?<=\w)_(?!\w)", r"\\_", escaped)
        elif not part.startswith(("``", ":")) and not part.endswith("_"):
            glued = number + 1 < len(parts) and parts[number + 1][:1].isalnum()
            parts[number] = f"`{part}`" + (r"\ " if glued else "")
    return "".join(parts)
