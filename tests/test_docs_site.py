"""The site builds without a warning, has a place for everything, and shows nothing that does not work."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shoestring.callbacks.catalog.registry import names
from shoestring.cluster.load import load_cluster
from shoestring.recipes import Recipe, load_recipe
from shoestring.trainer.cli.app import app

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = [*sorted(p for p in DOCS.rglob("*.md") if "generated" not in p.parts), ROOT / "CONTRIBUTING.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "doctrees")]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*build, str(DOCS), str(out / "html")], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_technique_has_a_page(site: Path) -> None:
    index = (site / "generated" / "techniques" / "index.html").read_text()
    for name in names():
        page = (site / "generated" / "techniques" / f"{name}.html").read_text()
        assert all(heading in page for heading in ("Settings", "Together with other techniques", "Measured")), name
        assert f'href="{name}.html"' in index, name


def test_every_key_of_a_recipe_has_its_place(site: Path) -> None:
    page = (site / "generated" / "recipe.html").read_text()
    for name in Recipe.model_fields:
        assert f'id="key-recipe-{name}"' in page, name
    assert "optimizer.weight_decay" in page and "model.adapter.rank" in page


def test_every_command_has_its_place(site: Path) -> None:
    page = (site / "generated" / "command-line.html").read_text()
    for words in commands():
        assert f'id="command-{words.replace(" ", "-")}"' in page, words


def test_nothing_is_loaded_from_other_sites(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not loaded, page


STYLES = {
    "google": """Do `this` to **options of *all* kinds, `x`ed.

        Args:
            weights: the weight [out, in], or `None`; a name_ ends in an underscore.
                It goes on here | and there.
            *others: more.

        Returns:
            A dict {name: [B, T]}.

        Raises:
            ValueError: if |x| is *not* small.

        Example:
            trainer = Trainer(
                budget=Budget(usd=20),
            )

            >>> f(1)
            2

        Source: arXiv 1503.02531.
        """,
    "plain": """Ends the run (a | b | *).

        budget: the first limit ends it,
            also over restarts.
        seed: a number.

            one(budget)  # indented: as it stands
        usd, kwh       money and energy
        hours          wall time

        No list: it just goes on
          like this.
        """,
}


@pytest.mark.parametrize("style", STYLES)
def test_docstrings_of_every_style_are_read_without_a_warning(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    from docutils.core import publish_doctree
    from generate.docstrings import rendered
    from sphinx.ext.napoleon import Config, GoogleDocstring

    lines = rendered(inspect.cleandoc(STYLES[style]).splitlines(), {"budget", "seed"})
    text = str(GoogleDocstring(lines, Config(napoleon_use_param=True), what="function"))
    read = publish_doctree(text, settings_overrides={"report_level": 2, "halt_level": 2, "warning_stream": None})
    assert not list(read.findall(lambda node: node.tagname in ("system_message", "problematic"))), read.pformat()


def commands() -> dict[str, set[str]]:
    """Every command, and the options that it has."""
    import typer

    def opened(words: str, command) -> dict[str, set[str]]:  # type: ignore[no-untyped-def]
        if hasattr(command, "commands"):
            inner = [opened(f"{words} {name}".strip(), one) for name, one in command.commands.items()]
            return {key: value for one in inner for key, value in one.items()}
        return {words: {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}}

    return opened("", typer.main.get_command(app))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.S | re.M)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_commands_that_are_shown_exist(path: Path) -> None:
    known = commands()
    for line in "".join(blocks(path, "sh")).splitlines():
        words = re.sub(r"\s#.*| \|.*", "", line).split()
        if not words or words[0] != "shoestring":
            continue
        name = next((n for n in (" ".join(words[1:3]), words[1]) if n in known), None)
        assert name, line
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= known[name], line


SHOWN = [(path.stem, block) for path in WRITTEN for block in blocks(path, "yaml")]


def test_both_kinds_of_files_are_shown() -> None:
    assert {"engine" in yaml.safe_load(block) for _, block in SHOWN} == {True, False}


@pytest.mark.parametrize("block", [block for _, block in SHOWN], ids=[stem for stem, _ in SHOWN])
def test_recipes_and_cluster_files_that_are_shown_are_valid(block: str, tmp_path: Path) -> None:
    """And what is read of them is what is shown: every section that a block has."""
    keys = yaml.safe_load(block).keys()
    file = tmp_path / "shown.yaml"
    base = "quickstart" if "sources:" in block or "prompts:" in block else "digits"  # which has one source of images
    file.write_text(block if keys & {"engine", "model"} else f"extends: {base}\n{block}")  # or a piece of a recipe
    loaded = (load_cluster if "engine" in keys else load_recipe)(file)
    assert keys - {"extends"} <= loaded.model_fields_set | {"name"}


@pytest.mark.parametrize("path", [*WRITTEN, ROOT / "SECURITY.md", ROOT / "README.md"], ids=lambda path: path.stem)
def test_files_that_are_named_are_there(path: Path) -> None:
    named = re.findall(
        r"`((?:trainer|callbacks|recipes|cluster|tests|benchmarks|examples|docs)/[\w./-]+)`", path.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
