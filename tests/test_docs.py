"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoestring import __version__
from shoestring.callbacks.catalog.registry import names
from shoestring.recipes import load_recipe, shipped_recipes
from shoestring.trainer.cli.technique_table import technique_table

pytestmark = pytest.mark.filterwarnings("ignore")
README = Path(__file__).parents[1] / "README.md"


def test_the_table_of_techniques_has_a_whole_row_for_each() -> None:
    rows = [line.strip("|").split("|") for line in technique_table().splitlines()[2:]]
    assert [cells[0].strip(" `") for cells in rows] == names()
    assert {len(cells) for cells in rows} == {5} and all(cell.strip() for cells in rows for cell in cells[:4])


def test_the_first_recipe_is_a_valid_one(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", README.read_text(), re.S)
    assert block
    path = tmp_path / "diary.yaml"
    path.write_text(block[1])
    recipe = load_recipe(path)
    assert recipe.budget.usd == 5
    assert [t.name for t in recipe.techniques] == ["gradient_checkpointing", "sequence_length_warmup"]


def test_every_shipped_recipe_is_named(tmp_path: Path) -> None:
    text = README.read_text()
    assert all(f"`{name}`" in text for name in shipped_recipes())


def test_versions_agree() -> None:
    assert f"version: {__version__}\n" in (README.parent / "CITATION.cff").read_text()
    assert __version__ in (README.parent / "CHANGELOG.md").read_text()


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README.read_text())):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert "make test" in (README.parent / ".ci" / "run").read_text()
