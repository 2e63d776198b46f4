"""Reference tables made from the code itself, so that they cannot be out of date."""

from __future__ import annotations

from ...callbacks.registry import names, technique_class

BEGIN, END = "<!-- techniques: begin -->", "<!-- techniques: end -->"


def technique_table() -> str:
    """Every registered technique as a Markdown table, from its card."""
    lines = ["| technique | what it does | saves | keeps | paper |", "|---|---|---|---|---|"]
    for name in names():
        card = technique_class(name).card
        link = f"[{card.paper}](https://arxiv.org/abs/{card.paper})" if card.paper else ""
        lines.append(f"| `{name}` | {card.does} | {', '.join(sorted(card.saves))} | {card.keeps} | {link} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """`text` with the table between its two marks made anew."""
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n{technique_table()}\n{END}{tail}"
