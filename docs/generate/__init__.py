"""Pages made from the code at build time: they cannot be out of date, and none of them is committed."""

from __future__ import annotations

from pathlib import Path

from . import api, command_line, keys, optimizers, results, techniques


def pages() -> dict[str, str]:
    """Every generated page: its path below `docs/generated` -> its text in MyST Markdown."""
    return {
        **techniques.pages(),
        "optimizers.md": optimizers.page_text(),
        "recipe.md": keys.recipe_page(),
        "cluster-file.md": keys.cluster_page(),
        "command-line.md": command_line.page_text(),
        **api.pages(),
        **results.pages(),
    }


def write(folder: Path) -> None:
    """Write all pages into `folder`; a page that is as it should be is not touched, one without a source is removed."""
    made = pages()
    for path in folder.rglob("*.md"):
        if str(path.relative_to(folder)) not in made:
            path.unlink()
    for name, text in made.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
