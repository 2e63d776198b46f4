"""What the benchmarks found, as pages of the site, and which of them concern a technique."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def pages() -> dict[str, str]:
    made = {f"results/{path.name}": path.read_text() for path in sorted((BENCHMARKS / "results").glob("*.md"))}
    made["results/index.md"] = made.pop("results/README.md") + "\n" + _toctree()
    return made


def about(name: str, class_name: str) -> list[tuple[str, str]]:
    """(file, title) of the pages that name a technique, or whose script trains with it."""
    words = [re.escape(class_name)] + ([re.escape(name)] if "_" in name else [])
    pattern = re.compile(rf"\b({'|'.join(words)})\b")
    return [(page, title) for page, title in _titles().items() if pattern.search(_text(page))]


@cache
def _titles() -> dict[str, str]:
    paths = sorted((BENCHMARKS / "results").glob("*.md"))
    return {path.name: path.read_text().partition("\n")[0].lstrip("# ") for path in paths if path.stem != "README"}


@cache
def _text(page: str) -> str:
    """A page, the script of that name, and what the script imports from beside it."""
    text = (BENCHMARKS / "results" / page).read_text()
    script = BENCHMARKS / f"{Path(page).stem}.py"
    if script.is_file():
        source = script.read_text()
        beside = [BENCHMARKS / f"{module}.py" for module in re.findall(r"^(?:from|import) (\w+)", source, re.M)]
        text += source + "".join(path.read_text() for path in beside if path.is_file())
    return text


def _toctree() -> str:
    return "```{toctree}\n:hidden:\n\n" + "\n".join(Path(page).stem for page in _titles()) + "\n```\n"
