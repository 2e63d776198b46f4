"""Optimizers by name, by entry point and by a user's own name: what each goes with is known before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import command

from shoestring.recipes import Recipe, RecipeError, recipe_from
from shoestring.strategies import OFFLOADS
from shoestring.trainer import plan
from shoestring.trainer.lightning.zero import UnknownStrategy, make_strategy
from shoestring.trainer.tasks.optimizer_cards import OPTIMIZERS, OptimizerCard, UnknownOptimizer, optimizer_card

pytestmark = pytest.mark.filterwarnings("ignore")

OWN = """
import torch
from shoestring.trainer.tasks.optimizer_cards import OptimizerCard

class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()
        return loss

def made(parameters, settings):
    return torch.optim.SGD([p for _, p in parameters], lr=settings.lr)

def nothing(parameters, settings):
    return 3

card = OptimizerCard(make=made, state_bytes=0, whole_parameters=True)
"""
TRAIN = ("train", "digits", "techniques=[]", "evaluation.at_end=false", "budget.steps=3", "--run-dir", "run")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_optimizers_of_a_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_optimizers_of_a_test", raising=False)
    return tmp_path


def recipe(optimizer: str, *, allow_code: bool = False, **strategy: object) -> Recipe:
    values = {
        "model": {"task": "image-classification", "config": {"kind": "mlp", "hidden": [8]}},
        "data": {"source": "digits", "batch_size": 8}, "budget": {"steps": 2},
        "optimizer": {"name": optimizer}, "strategy": strategy,
    }  # fmt: skip
    return recipe_from(values, "r", allow_code)


# -- what a plan says --------------------------------------------------------------------------------------------------
def test_a_misspelt_name_is_a_problem_of_the_recipe() -> None:
    with pytest.raises(
        RecipeError, match=r"optimizer\.name: found adafactr; allowed: adamw \| .*did you mean adafactor\?"
    ):
        plan(recipe("adafactr"))
    with pytest.raises(UnknownOptimizer, match="did you mean muon"):
        optimizer_card("moun")


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_whole_matrices_and_shards_do_not_go_together(strategy: str) -> None:
    with pytest.raises(RecipeError, match=rf"optimizer\.name: found muon; .*with strategy\.name {strategy}; .*adamw"):
        plan(recipe("muon", name=strategy, devices=2))
    assert plan(recipe("adamw", name=strategy, devices=2)).strategy == strategy


def test_auto_chooses_what_goes_with_the_optimizer_and_the_offload() -> None:
    assert plan(recipe("muon", devices=2)).strategy == "ddp"
    assert plan(recipe("adamw", devices=2, offload="optimizer")).strategy == "zero2"
    assert plan(recipe("adamw", devices=1, offload="optimizer")).strategy == "zero2"
    assert plan(recipe("adamw", devices=2, offload="parameters")).strategy == "zero3"
    with pytest.raises(RecipeError, match=r"found muon; .*with strategy\.offload optimizer"):
        plan(recipe("muon", devices=2, offload="optimizer"))


@pytest.mark.parametrize("offload", ["none", "optimizer", "parameters"])
@pytest.mark.parametrize("strategy", OFFLOADS)
def test_what_plan_accepts_the_trainer_makes(strategy: str, offload: str) -> None:
    """And what the one refuses the other does too."""
    devices = 1 if strategy == "single" else 2
    if offload in OFFLOADS[strategy]:
        assert plan(recipe("adamw", name=strategy, offload=offload, devices=devices)).offload == offload
        make_strategy(strategy, accelerator="cpu", offload=offload)
        return
    with pytest.raises(RecipeError, match=rf"strategy\.offload: found '{offload}'.*needs zero"):
        recipe("adamw", name=strategy, offload=offload, devices=devices)
    with pytest.raises(UnknownStrategy, match="needs zero"):
        make_strategy(strategy, accelerator="cpu", offload=offload)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_no_larger_than_the_card_says(name: str) -> None:
    settings = recipe(name).optimizer
    layer = torch.nn.Linear(64, 64)
    optimizer = OPTIMIZERS[name].builder()(list(layer.named_parameters()), settings)
    layer(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    kept = [v for entries in optimizer.state.values() for v in entries.values() if torch.is_tensor(v) and v.numel() > 1]
    held = sum(v.numel() * v.element_size() for v in kept)
    vectors = 4 * 3 * 64  # of a factored matrix, and of the bias
    assert held <= OPTIMIZERS[name].state_bytes * sum(p.numel() for p in layer.parameters()) + vectors


# -- a user's own ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attribute", ["Signs", "made", "card"])
def test_a_class_a_function_and_a_card_train(attribute: str, own: Path, monkeypatch, capsys) -> None:
    name = f"optimizer.name=own_optimizers_of_a_test:{attribute}"
    assert command(monkeypatch, *TRAIN, "strategy.name=single", name, "--allow-code") == 0, capsys.readouterr().err
    assert json.loads((own / "run" / "summary.json").read_text())["steps"] == 3


def test_a_users_own_needs_leave_and_has_to_be_one(own: Path, monkeypatch, capsys) -> None:
    for attribute, words, said in (
        ("Signs", (), "a module:attr only with --allow-code"),
        ("absent", ("--allow-code",), "optimizer.name: found own_optimizers_of_a_test:absent"),
        ("nothing", ("--allow-code",), "made 3, which is not a torch.optim.Optimizer"),
    ):
        name = f"optimizer.name=own_optimizers_of_a_test:{attribute}"
        assert command(monkeypatch, *TRAIN, "strategy.name=single", name, *words) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(RecipeError, match="needs whole weight matrices"):
        plan(recipe("own_optimizers_of_a_test:card", allow_code=True, name="zero2", devices=2))
    assert isinstance(optimizer_card("own_optimizers_of_a_test:made"), OptimizerCard)
