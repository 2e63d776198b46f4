"""Malformed recipes: each mistake is one line with its place, the value, the rule and the way out."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.recipes import RecipeError, load_recipe
from shoestring.yaml_reader import MAX_BYTES, MAX_DEPTH, MAX_NODES

GOLDEN = Path(__file__).parents[1] / "golden" / "malformed_recipes.txt"
WHOLE = Path(__file__).parents[1] / "golden" / "whole_recipe.yaml"
GOOD = WHOLE.read_text()


def cases():
    """Name -> (recipe, overrides, answer) of the golden file."""
    cases_by_name = {}
    for case in GOLDEN.read_text().split("\n== ")[1:]:
        name, *lines = case.strip("\n").split("\n")
        overrides = [line[2:] for line in lines if line.startswith("$ ")]
        answer = [line[3:] for line in lines if line.startswith("-> ")]
        recipe = "\n".join(line for line in lines if line[:2] not in ("$ ", "->"))
        cases_by_name[name] = (recipe, overrides, "\n".join(answer))
    return cases_by_name


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test in a folder of its own, so that messages name files as `r.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.yaml").write_text(GOOD)
    return tmp_path


def problems(text, *overrides):
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", overrides)
    return caught.value.problems


def answer(name, recipe, overrides):
    upon = "" if name.startswith("alone: ") else "\nextends: whole.yaml\n"
    return "\n".join(str(problem) for problem in problems(recipe + upon, *overrides))


@pytest.mark.skipif(os.environ.get("SHOESTRING_GOLDEN") == "write", reason="writing the answers")
@pytest.mark.parametrize("name", cases())
def test_malformed(name, folder):
    recipe, overrides, expected = cases()[name]
    assert expected.count("\n") == 0 and "; allowed: " in expected
    assert answer(name, recipe, overrides) == expected
    assert {path.name for path in folder.iterdir()} == {"r.yaml", "whole.yaml"}  # no payload ran, nothing is left


def test_the_words_are_ours():
    text = GOLDEN.read_text()
    if os.environ.get("SHOESTRING_GOLDEN") == "write":
        blocks = [text.split("\n== ")[0].rstrip("\n")]
        for name, (recipe, overrides, _) in cases().items():
            lines = [f"$ {override}" for override in overrides] + recipe.split("\n")
            said = answer(name, recipe, overrides).split("\n")
            blocks.append("\n".join(filter(None, [f"\n== {name}", *lines, *(f"-> {line}" for line in said)])))
        text = "\n".join(blocks) + "\n"
        GOLDEN.write_text(text)
    assert not any(word in text.lower() for word in ("input should", "pydantic", "validation error", "literal["))


def bomb(levels):
    """Each line ten times the one before: 10^levels words in all."""
    lines = ["a0: &a0 lol"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels + 1)]
    return "\n".join(lines)


def test_a_bomb_is_counted_not_expanded():
    (only,) = problems(bomb(60))  # 10^60 nodes
    assert only.where == "r.yaml:5" and only.allowed == f"at most {MAX_NODES} nodes in a file"
    assert MAX_NODES < int(only.found.split()[0]) < 2 * MAX_NODES  # refused at the first alias that goes beyond


@pytest.mark.parametrize(
    ("text", "where", "found", "allowed"),
    [
        ("", "r.yaml:1", "an empty file", "a mapping"),
        (f"x: {'[' * 5000}", "r.yaml:1", f"{MAX_DEPTH + 1} levels", f"at most {MAX_DEPTH}"),
        (f"x: {'{a: ' * 5000}", "r.yaml:1", f"{MAX_DEPTH + 1} levels", f"at most {MAX_DEPTH}"),
        (f"seed: 1 # {'x' * MAX_BYTES}", "r.yaml:1", "more than 256 KiB", "at most 256 KiB"),
        (f"seed: {'9' * 5000}", "r.yaml:1", "999", "at most 40 characters"),
        ("seed: 1\nname: \x07", "r.yaml:2", "the character '\\x07'", "printable text"),
        (b"seed: 1\nname: caf\xe9\n", "r.yaml:2", "the byte 0xe9, which is not UTF-8", "text in UTF-8"),
        ("seed: 1".encode("utf-16"), "r.yaml:1", "the byte 0xff, which is not UTF-8", "text in UTF-8"),
    ],
)
def test_files_that_are_no_recipe(text, where, found, allowed):
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    first = caught.value.problems[0]
    assert first.where == where and found in first.found and allowed in first.allowed


@pytest.mark.parametrize(
    ("path", "found", "hint"),
    [
        ("quickstrat.yaml", "no such file", "did you mean quickstart?"),
        ("whole.yml", "no such file", "did you mean whole.yaml?"),
        ("nowhere/else.yaml", "no such file", "shipped are classify-csv"),
        (".", "a directory", "whole.yaml"),
        ("/dev/zero", "no regular file", ""),
        ("a\0b", "no such file", ""),
        ("x" * 5000, "File name too long", ""),
    ],
)
def test_files_that_cannot_be_read(path, found, hint):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (only,) = caught.value.problems
    assert found in only.found and hint in only.hint and str(caught.value).isprintable()


def test_every_problem_is_reported_at_once():
    reported = problems(
        GOOD.replace("gpt2", "gpt2\n  adapter: {rnk: 3}") + "seed: !x 1\nseed: 2\nprecision: fp3\n"
        "strategy: {name: single, devices: 3}\ngoal: {metric: a}\noptimizer: {lr: 0, betas: [2, 0.1]}\n",
        "evaluation.every=never",
        "typo=1",
    )
    assert [(each.where, each.key) for each in reported] == [
        ("r.yaml:4", "model.adapter.rnk"),
        ("r.yaml:9", "seed"),
        ("r.yaml:10", "seed"),
        ("r.yaml:11", "precision"),
        ("r.yaml:12", "strategy.devices"),
        ("r.yaml:13", "goal"),
        ("r.yaml:13", "goal.metric"),
        ("r.yaml:14", "optimizer.lr"),
        ("r.yaml:14", "optimizer.betas[0]"),
        ('override "evaluation.every=never"', "evaluation.every"),
        ('override "typo=1"', "typo"),
    ]
    assert reported[0].hint == "did you mean rank?"


def test_messages_carry_no_terminal_codes():
    only = problems(GOOD, "precision=\x1b[31mred\x85\u202e")[0]
    assert "\\x1b[31mred" in str(only) and str(only).isprintable()
    assert str(replace(only, key="\x1b[2J", found="\n")).isprintable()


def test_an_error_of_a_base_stands_in_the_base():
    Path("base.yaml").write_text("seed: 1\nextends: whole.yaml\nsead: 4\n")
    assert problems("extends: base.yaml\n")[0].where == "base.yaml:3"


def test_extends_in_a_circle():
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("seed: 1\nextends: r.yaml\n")
    (only,) = problems("extends: a.yaml\n")
    assert (only.where, only.found) == ("b.yaml:2", "a circle: r.yaml -> a.yaml -> b.yaml -> r.yaml")


def test_extends_reads_each_file_once_and_not_too_many():
    for number in range(30):  # 2^30 readings if each were read anew
        Path(f"{number}.yaml").write_text(f"extends: [{number + 1}.yaml, {number + 1}.yaml]\n")
    Path("30.yaml").write_text(GOOD)
    assert load_recipe("0.yaml").budget.steps == 100
    for number in range(100):
        Path(f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert problems("extends: 0.yaml\n")[0].found == "more than 64 files"
