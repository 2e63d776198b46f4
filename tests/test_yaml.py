"""One YAML for recipes and cluster files, read by the rules of 1.2, and written so that 1.1 reads it back as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.cluster.config.document import read
from shoestring.cluster.config.hardware import CATALOGUE, hardware
from shoestring.problems import Malformed
from shoestring.recipes import load_recipe
from shoestring.yaml_reader import is_text, plain, read_text, read_yaml
from shoestring.yaml_writer import write_yaml

ODD = ["1e-4", "off", "yes", "010", "0o17", "1_000", "12:30", "2026-01-01", "null", "~", "", ".nan", "1e999", "9" * 50,
       "- a", "{", "# b", "a: b", "!x", "&a", "*a", "two\nlines\n", " \n x", "\u2028", "\x85", "=", "<<"]  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.sampled_from(ODD)
VALUES = st.recursive(
    SCALARS | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=150),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ODD) | st.text("ab ", max_size=3), inner)
    ),
    max_leaves=6,
)


def ours(text: str) -> Any:
    tree, problems = read_yaml(text, lambda line: f"f:{line}")
    assert not problems
    return plain(tree)


@pytest.mark.parametrize(
    ("word", "value"), [("off", "off"), ("yes", "yes"), ("1e-4", 1e-4), ("010", 10), ("0o10", 8), ("12:30", "12:30")]
)
def test_recipes_and_cluster_files_agree(word: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"options: {{a: {word}}}\n")
    assert read(tmp_path / "c.yaml").values == {"options": {"a": value}}
    lines = "model: {task: causal-lm, name: a}\ndata: {source: b, args: {a: %s}}\nbudget: {steps: 1}\n"
    (tmp_path / "r.yaml").write_text(lines % word)
    args = load_recipe(tmp_path / "r.yaml").data.args
    assert args == {"a": value} and type((args or {})["a"]) is type(value)
    assert is_text(word) == isinstance(value, str)


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_what_is_written_is_read_back_by_old_and_new_rules(value: object) -> None:
    text = write_yaml(value)
    assert ours(text) == value == yaml.safe_load(text)


def test_shared_values_are_written_out() -> None:
    shared = {"a": 1}
    assert write_yaml({"z": shared, "b": [shared]}) == "z:\n  a: 1\nb:\n- a: 1\n"


def test_the_shipped_catalogue_is_the_same_by_our_rules() -> None:
    """It is loaded by libyaml, which is faster, and makes dates of dates."""
    theirs = yaml.safe_load(CATALOGUE.read_text())
    assert ours(read_text(CATALOGUE)) == json.loads(json.dumps(theirs, default=str))


def test_a_users_hardware_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path))
    (tmp_path / "hardware.yaml").write_text("hardware: {cpu: {watts: 1e2}}\n")
    assert hardware("cpu").watts == 100
    (tmp_path / "hardware.yaml").write_text("# nothing yet\n")
    assert hardware("cpu").watts != 100


def test_an_empty_file_is_a_mistake_where_something_is_needed() -> None:
    assert ours("# later\n") == {}
    with pytest.raises(Malformed, match="f:1: found an empty file; allowed: a mapping with a name"):
        read_yaml("", lambda line: f"f:{line}", least="a mapping with a name")
