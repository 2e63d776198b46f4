"""What a user reads of the public names: every argument explained, and examples that run."""

from __future__ import annotations

import doctest
import inspect
import re
import sys
from typing import Any

import pytest

import shoestring.callbacks
import shoestring.recipes
import shoestring.trainer
from shoestring import ShoestringError
from shoestring.callbacks.catalog.registry import TECHNIQUES, technique_class

pytestmark = pytest.mark.filterwarnings("ignore")
PUBLIC: dict[str, Any] = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module, names in (
        (shoestring.trainer, shoestring.trainer.__all__),
        (shoestring.callbacks, shoestring.callbacks.__all__),
        (shoestring.recipes, ("Recipe", "load_recipe", "recipe_from", "shipped_recipes")),
    )
    for name in names
}
MODULES = sorted({public.__module__ for public in PUBLIC.values()})


def sections(text: str) -> dict[str, list[str]]:
    """Section -> its lines, of a docstring in Google style."""
    lines_of: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(text).splitlines():
        if heading := re.fullmatch(r"(Args|Attributes|Returns|Raises|Example):", line):
            current = heading[1]
            lines_of[current] = []
        elif current and line and not line.startswith(" "):
            current = ""
        lines_of[current].append(line)
    return lines_of


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_explained(name: str) -> None:
    public = PUBLIC[name]
    assert public.__doc__, f"{name} has no docstring"
    if isinstance(public, type) and issubclass(public, ShoestringError):
        return
    parts = sections(public.__doc__)
    assert parts[""][0].endswith((".", "?")), f"{name}: the first line is a sentence"
    lines = [*parts.get("Args", ()), *parts.get("Attributes", ())]
    explained = [match[1] for line in lines if (match := re.match(r"    \**(\w+): \S", line))]
    parameters = list(getattr(public, "model_fields", None) or inspect.signature(public).parameters)
    assert explained == parameters, f"{name}: Args are the signature's, in its order"
    assert any(">>>" in line for line in parts.get("Example", ())), f"{name} has no example that runs"
    if not isinstance(public, type):
        assert parts.get("Returns"), f"{name} does not say what it returns"


@pytest.mark.parametrize("name", [name for name, public in PUBLIC.items() if isinstance(public, type)])
def test_every_public_method_is_explained(name: str) -> None:
    """Hooks by their base class."""
    methods = [
        method
        for method, value in vars(PUBLIC[name]).items()
        if inspect.isroutine(value) or isinstance(value, property)
    ]
    bare = [method for method in methods if method[0] != "_" and not inspect.getdoc(getattr(PUBLIC[name], method))]
    assert not bare, f"no docstring: {bare}"


@pytest.mark.parametrize("name", TECHNIQUES)
def test_techniques_name_their_source(name: str) -> None:
    technique = technique_class(name)
    assert f"arXiv {technique.card.paper}" in (technique.__doc__ or "")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    failed, attempted = doctest.testmod(sys.modules[name], optionflags=doctest.ELLIPSIS)
    assert attempted
    assert not failed, "see the output above"
