"""Draws `architecture.svg`: `python docs/draw_architecture.py`. Colours work on light and on dark pages."""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 860, 560
BLUE, GREEN, ORANGE, VIOLET, GREY = "#2f6fb0", "#3b8f5a", "#b9722d", "#7a5aa8", "#7d8590"
PATH = ("recipe.yaml", "Recipe", "Plan", "one Lightning run", "Report")


def box(x: int, y: int, width: int, height: int, colour: str, title: str, *lines: str) -> str:
    text = "".join(
        f'<text x="{x + width / 2}" y="{y + 52 + 19 * n}" class="small">{line}</text>' for n, line in enumerate(lines)
    )
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="9" fill="{colour}" fill-opacity=".14" '
        f'stroke="{colour}" stroke-width="1.8"/>'
        f'<text x="{x + width / 2}" y="{y + 28}" class="title" style="fill:{colour}">{title}</text>{text}'
    )


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{GREY}" stroke-width="1.8" marker-end="url(#tip)"/>'


def rooms() -> str:
    """The star: trainer imports the three, which import only what all share."""
    return "".join([
        box(250, 34, 360, 70, VIOLET, "trainer", "brings them together: plan, fit, account, launch"),
        arrow(310, 104, 150, 164), arrow(430, 104, 430, 164), arrow(550, 104, 710, 164),
        box(30, 168, 240, 88, BLUE, "recipes", "what", "YAML in, a validated Recipe out"),
        box(310, 168, 240, 88, GREEN, "callbacks", "how to be thrifty", "techniques, clock, budget"),
        box(590, 168, 240, 88, ORANGE, "cluster", "where", "jobs, engines, nodes, prices"),
        arrow(150, 256, 300, 304), arrow(430, 256, 430, 304), arrow(710, 256, 560, 304),
        box(250, 308, 360, 62, GREY, "what all share", "a few small files without torch"),
    ])  # fmt: skip


def path() -> str:
    """A run from left to right, and what it leaves."""
    parts = ['<text x="30" y="416" class="label">the path of a run</text>']
    verbs = ("load", "plan", "fit", "account")
    for number, name in enumerate(PATH):
        x = 30 + number * 166
        parts.append(
            f'<rect x="{x}" y="432" width="136" height="40" rx="20" fill="{GREY}" fill-opacity=".14" '
            f'stroke="{GREY}"/><text x="{x + 68}" y="457" class="small">{name}</text>'
        )
        if number < len(verbs):
            parts.append(arrow(x + 136, 452, x + 163, 452))
            parts.append(f'<text x="{x + 150}" y="424" class="verb">{verbs[number]}</text>')
    remarks = (
        "during the run: techniques act · the meter measures · the budget ends it · checkpoints and journal are kept",
        "on a cluster: launch renders a job whose command is train with the same recipe",
    )
    return "".join(parts) + "".join(
        f'<text x="30" y="{506 + 22 * n}" class="label">{text}</text>' for n, text in enumerate(remarks)
    )


def drawing() -> str:
    style = (
        "text{font-family:system-ui,sans-serif;fill:#7d8590}"
        ".title{font-size:18px;font-weight:600;text-anchor:middle}.small{font-size:14px;text-anchor:middle}"
        ".verb{font-size:12px;text-anchor:middle;font-style:italic}.label{font-size:14px}"
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{GREY}"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="The packages of Shoestring and the path of a run"><style>{style}</style>{tip}'
        f"{rooms()}{path()}</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(drawing())
