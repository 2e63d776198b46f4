"""Collect every claim that a page of results judges into one: benchmarks/results/README.md.

    python benchmarks/claims.py

A table judges claims where it has the columns "difference, points" and "on these data"; its first column is the claim.
Lines that begin with "Target" are gains that were asked for, and are quoted as they stand.
"""

from __future__ import annotations

import re
from pathlib import Path

from report import RESULTS, page, table, wrapped

DIFFERENCE, VERDICT = "difference, points", "on these data"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def judged(path: Path) -> list[list[str]]:
    """(page, section, claim, difference, verdict) of every row of a page's tables that judge."""
    rows: list[list[str]] = []
    title, section, head = "", "", []
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            level, _, said = line.partition(" ")
            title, section = (said, "") if level == "#" else (title, said)
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells(line)
        elif DIFFERENCE in head and VERDICT in head and not set(line) <= set("|- "):
            row = dict(zip(head, cells(line), strict=True))
            rows.append([f"[{title}]({path.name})", section, cells(line)[0], row[DIFFERENCE], row[VERDICT]])
    return rows


def targets(path: Path) -> list[str]:
    """What a page says of gains that were asked for, each as one line."""
    paragraphs = re.split(r"\n(?=- |\n)", path.read_text())
    said = [" ".join(part.split()).removeprefix("- ") for part in paragraphs]
    return [f"- {part} ([page]({path.name}))" for part in said if part.startswith("Target")]


def main() -> None:
    pages = sorted(path for path in RESULTS.glob("*.md") if path.name != "README.md")
    rows = [row for path in pages for row in judged(path)]
    silent = [f"[{path.stem}]({path.name})" for path in pages if not judged(path)]
    text = page(
        "What the benchmarks found",
        wrapped("Every claim of a page here: the difference that was seen, its 95 % interval, and whether the ordering "
                "appears on these data. Where the interval holds 0, nothing is shown either way. Small data on a CPU: "
                "what appears here is no proof for large models, and what does not is no refutation. Made by `python "
                "benchmarks/claims.py` from the pages, which say date, machine and settings; whoever makes a page anew "
                "runs it again."),
        "## Orderings", table(["page", "section", "claim", DIFFERENCE, VERDICT], rows),
        f"Pages whose claims are in their own words: {', '.join(silent) or 'none'}.",
        "## Gains asked for", [line for path in pages for line in targets(path)],
    )  # fmt: skip
    (RESULTS / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
