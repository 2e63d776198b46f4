"""The schema that editors get says of a recipe what the loader says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command_line import command

from shoestring.recipes import recipe_schema, shipped_recipes
from shoestring.recipes.reader import read_tree
from shoestring.yaml_reader import YamlNode

jsonschema = pytest.importorskip("jsonschema")


def plain(node: YamlNode) -> Any:
    """What an editor reads."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    return [plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def mistakes(text: str) -> list[str]:
    tree, problems = read_tree(text, lambda line: f"r.yaml:{line}")
    assert not problems
    return [each.json_path for each in jsonschema.Draft202012Validator(recipe_schema()).iter_errors(plain(tree))]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_have_no_mistake(name: str) -> None:
    assert mistakes(shipped_recipes()[name].read_text()) == []


GOOD = (
    "extends: [digits, base.yaml]\nbudget: {hours: 2 min, usd: $5, steps: null}\ntechniques: [rigl, set: {every: 5}]\n"
)


@pytest.mark.parametrize(
    ("text", "place"),
    [("", None), ("optimizer: {lrr: 1}\n", "$.optimizer"), ("precision: fp8\n", "$.precision"),
     ("data: {source: a, batch_size: 0}\n", "$.data.batch_size"), ("seeds: 1\n", "$"), ("budgets: {}\n", "$")],
)  # fmt: skip
def test_what_the_loader_takes_is_taken_and_what_it_refuses_is_marked(text: str, place: str | None) -> None:
    assert mistakes(GOOD + text) == ([] if place is None else [place])


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "recipes", "schema") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(recipe_schema()))


def test_a_shipped_recipe_is_shown_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "recipes", "show", "sft-lora", "--as-written") == 0
    assert capsys.readouterr().out == shipped_recipes()["sft-lora"].read_text()
    assert command(monkeypatch, "recipes", "show", "sft-lora", "seed=1", "--as-written") == 2
    assert "a file is shown as it is" in capsys.readouterr().err
    assert command(monkeypatch, "recipes", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() == shipped_recipes().keys()
