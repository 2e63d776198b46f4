"""Reference tables made from the code itself, so that they cannot be out of date."""

from __future__ import annotations

from ...callbacks.catalog.registry import names, technique_class


def technique_table() -> str:
    """Every registered technique as a Markdown table, from its card."""
    lines = ["| technique | what it does | saves | keeps | paper |", "|---|---|---|---|---|"]
    for name in names():
        card = technique_class(name).card
        link = f"[{card.paper}](https://arxiv.org/abs/{card.paper})" if card.paper else ""
        lines.append(f"| `{name}` | {card.does} | {', '.join(sorted(card.saves))} | {card.keeps} | {link} |")
    return "\n".join(lines)
