"""Recipes: what is read, how files and overrides are laid upon each other, what the hash means."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from shoestring.recipes import (
    BudgetSpec,
    RecipeError,
    load_recipe,
    recipe_from,
    shipped_recipes,
)
from shoestring.recipes.schema import Section
from shoestring.yaml_reader import scalar

GOOD = (Path(__file__).parents[1] / "golden" / "whole_recipe.yaml").read_text()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test in a folder of its own, so that messages name files as `r.yaml`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text, *overrides, allow_code=False):
    Path("r.yaml").write_text(text)
    return load_recipe("r.yaml", overrides, allow_code)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E4", 1e4), (".5", 0.5), ("5.", 5.0), ("-3", -3), ("+7", 7), ("0x1F", 31), ("0o17", 15)]
    + [(word, word) for word in ("off", "on", "yes", "no", "y", "2 min", "1_000", "1:30", "2020-01-01", "nan", "0b1")]
    + [("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("-.inf", -float("inf"))],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert scalar(text) == value and type(scalar(text)) is type(value)


def test_anchors_within_reason():
    text = (
        "model:\n  task: causal-lm\n  tokenizer: &type llama\n  config: {model_type: *type, sizes: [&size 4, *size]}\n"
    )
    recipe = load(text + "data: {source: a}\nbudget: {steps: 1}\n")
    assert recipe.model.config == {"model_type": "llama", "sizes": [4, 4]}
    assert (recipe.where("model.tokenizer"), recipe.where("model.config.model_type")) == ("r.yaml:3", "r.yaml:4")


def test_shipped_recipes_load_and_show_their_names():
    shipped = shipped_recipes()
    assert {"quickstart", "finetune-minilm", "digits", "finetune-lora"} <= set(shipped)
    for name, path in shipped.items():
        recipe = load_recipe(path)
        assert recipe.name == name and load_recipe(name) == recipe
        assert all(line.isascii() and len(line) <= 120 for line in path.read_text().splitlines())


def test_every_field_says_what_is_allowed():
    def sections(section):
        return [section, *(nested for child in section.__subclasses__() for nested in sections(child))]

    for section in sections(Section):
        for name, field in section.model_fields.items():
            inner = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            choices = "Literal" in str(field.annotation)
            assert field.description or inner or choices or section is BudgetSpec or name in ("name", "settings"), name


def test_importing_and_loading_is_light():
    code = (
        "import time, sys, shoestring.recipes as r; seconds = time.process_time(); r.load_recipe('quickstart');"
        "heavy = {'torch', 'numpy', 'transformers', 'pytorch_lightning'} & set(sys.modules); print(seconds, heavy)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert all("set()" in run.stdout for run in runs)
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.4


# ---------------------------------------------------------------------------------------------- extends and overrides


def test_extends_merges_and_remembers_where_everything_came_from():
    Path("base").mkdir()
    Path("base/one.yaml").write_text("extends: ../root.yaml\noptimizer: {lr: 1e-3, betas: [0.5, 0.5]}\nseed: 1\n")
    Path("base/two.yaml").write_text("extends: ../root.yaml\noptimizer:\n  lr: 2e-3\ngoal: null\n")
    Path("root.yaml").write_text(GOOD + "goal: {metric: val_loss, below: 1}\ntechniques: [a, b]\n")
    recipe = load("extends:\n  - base/one.yaml\n  - base/two.yaml\nbudget:\n  usd: $3\ntechniques: [c]\n", "seed=7")
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.seed, recipe.goal) == (2e-3, (0.5, 0.5), 7, None)
    assert (recipe.budget.steps, recipe.budget.usd) == (100, 3)
    assert [technique.name for technique in recipe.techniques] == ["c"]
    places = ("optimizer.lr", "optimizer.betas[1]", "seed", "goal", "budget.usd", "budget.steps", "strategy.name")
    assert [recipe.where(key) for key in places] == [
        "base/two.yaml:3",
        "base/one.yaml:2",
        'override "seed=7"',
        "base/two.yaml:4",
        "r.yaml:5",
        "root.yaml:7",
        "r.yaml:1",
    ]


def test_overrides():
    recipe = load(
        GOOD + "techniques: [lr_scaling, gradual_pruning: {sparsity: 0.9, every: 5}, {own.code:Trick: {a: {b: 1}}}]\n",
        *(
            "optimizer.betas=[0.9, 0.95]",
            "optimizer.lr=1e-4",
            "tracking.wandb=off",
            "goal={metric: val_loss, below: 2}",
        ),
        *('name="0.1"', "evaluation.generate=def f(n): # no comment", "model.name=null", "model.tokenizer=t"),
        *("model.config.model_type=llama", "budget.usd=$5", "techniques.gradual_pruning.sparsity=0.5"),
        *("techniques.own.code:Trick.a.b=2", "techniques.lr_scaling.rule=sqrt", "techniques+={more: {x: [1]}}"),
        *("techniques+=[p, q]", "techniques-=p"),
        allow_code=True,
    )
    assert (recipe.optimizer.betas, recipe.optimizer.lr, recipe.tracking.wandb) == ((0.9, 0.95), 1e-4, "off")
    assert (recipe.goal.below, recipe.name, recipe.evaluation.generate) == (2, "0.1", "def f(n): # no comment")
    assert (recipe.model.name, recipe.model.config, recipe.budget.usd) == (None, {"model_type": "llama"}, 5)
    assert recipe.model_dump()["techniques"] == (
        {"lr_scaling": {"rule": "sqrt"}},
        {"gradual_pruning": {"sparsity": 0.5, "every": 5}},
        {"own.code:Trick": {"a": {"b": 2}}},
        {"more": {"x": [1]}},
        {"q": {}},
    )


def test_a_later_problem_has_its_place_too():
    recipe = load(GOOD + "techniques:\n  - rigl:\n      sparsity: 0.9\n", "techniques.rigl.every=3")
    late = recipe.problem("techniques.rigl.sparsity", 0.9, "a number below 0.5")
    assert (late.where, late.found) == ("r.yaml:10", "0.9")
    assert recipe.problem("techniques.rigl", "rigl", "...").where == "r.yaml:9"
    assert recipe.problem("techniques.rigl.every", 3, "...").where == 'override "techniques.rigl.every=3"'
    assert recipe.problem("techniques.rigl.absent", 3, "...").where == "r.yaml:9"


def test_own_code_is_the_callers_to_allow():
    text = GOOD.replace("causal-lm", "my.module:Net").replace("  name: gpt2\n", "  args: {size: 3}\n")
    recipe = load(text, allow_code=True)
    assert recipe.model.args == {"size": 3}
    with pytest.raises(RecipeError, match="--allow-code"):
        recipe_from(recipe.model_dump())
    for value in (float("nan"), Path("x"), {1, 2}):  # what no file could hold has no hash
        with pytest.raises(RecipeError, match=r"^recipe: data.args.a\[0\]: found "):
            recipe_from({**recipe.model_dump(exclude={"name"}), "data": {"source": "x", "args": {"a": [value]}}})


def test_a_recipe_cannot_be_changed():
    recipe = load(GOOD)
    for change in (lambda: setattr(recipe, "seed", 2), lambda: setattr(recipe.optimizer, "lr", 2.0)):
        with pytest.raises(ValueError, match="frozen"):
            change()
