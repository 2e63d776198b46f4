"""Optimizers by name, by entry point and by a user's own name: what each goes with is known before a run."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import command
from torch.profiler import ProfilerActivity, profile

from shoestring.callbacks.contract import IncompatibleTechniques
from shoestring.callbacks.optimization.averaged_point import averaged_point
from shoestring.recipes import Recipe, RecipeError, recipe_from
from shoestring.strategies import OFFLOADS
from shoestring.trainer import fit, plan
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.run.zero import UnknownStrategy, make_strategy
from shoestring.trainer.tasks.optimizers import low_rank, soap
from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS, OptimizerCard, UnknownOptimizer, optimizer_card
from shoestring.trainer.tasks.optimizers.make import maker

pytestmark = pytest.mark.filterwarnings("ignore")

OWN = """
import torch
from shoestring.trainer.tasks.optimizers.cards import OptimizerCard

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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_plan_accepts_what_the_card_names(strategy: str, name: str) -> None:
    if strategy in OPTIMIZERS[name].strategies:
        assert plan(recipe(name, name=strategy, devices=2)).strategy == strategy
        return
    with pytest.raises(RecipeError, match=rf"optimizer\.name: found {name}; .*with strategy\.name {strategy}; .*adamw"):
        plan(recipe(name, name=strategy, devices=2))


def test_whole_matrices_and_shards_do_not_go_together() -> None:
    assert OptimizerCard(make="own", whole_parameters=True).strategies == ["single", "ddp"]
    assert all(card.strategies == list(OFFLOADS) for card in OPTIMIZERS.values()), "ours gather what they need whole"


def test_auto_chooses_what_goes_with_the_optimizer_and_the_offload() -> None:
    assert plan(recipe("adamw", devices=2, offload="optimizer")).strategy == "zero2"
    assert plan(recipe("adamw", devices=1, offload="optimizer")).strategy == "zero2"
    assert plan(recipe("adamw", devices=2, offload="parameters")).strategy == "zero3"


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
def test_states_are_as_many_bytes_as_the_card_says(name: str) -> None:
    settings = recipe(name).optimizer.model_copy(update={"momentum": 0.9})
    layer = torch.nn.Linear(256, 256, bias=False)
    optimizer = maker(name)(list(layer.named_parameters()), settings)
    layer(torch.ones(2, 256)).sum().backward()
    optimizer.step()
    kept = [v for entries in optimizer.state.values() for v in entries.values() if torch.is_tensor(v) and v.numel() > 1]
    held = sum(v.numel() * v.element_size() for v in kept)
    card = OPTIMIZERS[name]
    claimed = card.bytes_of_matrices + card.whole_bytes + 2 * card.side_bytes + (8 / 256 if name == "adafactor" else 0)
    assert held == claimed * layer.weight.numel()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_copies_as_many_bytes_as_the_card_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that makes a new basis."""
    monkeypatch.setattr(low_rank, "EVERY", 1)
    monkeypatch.setattr(soap, "EVERY", 1)
    card, layer = OPTIMIZERS[name], torch.nn.Linear(1024, 1152, bias=False)
    optimizer = maker(name)(list(layer.named_parameters()), recipe(name).optimizer)
    for _ in range(2):  # the first one makes what stays
        layer.weight.grad = torch.ones_like(layer.weight)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
            optimizer.step()
    moments = [event for event in traced.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(moments, key=lambda event: event.start_ns())]
    elements = card.copies_of if isinstance(card.copies_of, int) else layer.weight.numel()
    assert max(accumulate(sizes), default=0) <= card.copied_bytes * elements + 2**14
    assert max(accumulate(sizes), default=0) >= 0.9 * card.copied_bytes * elements


# -- averages ----------------------------------------------------------------------------------------------------------
def shape_of(values: Recipe) -> str:
    return next(t for t in plan(values).techniques if t.card.name == "lr_schedule").shape


def test_what_averages_needs_no_falling_rate_and_no_other_average() -> None:
    assert shape_of(recipe("adamw")) == "linear" and shape_of(recipe("schedule_free_adamw")) == "constant"
    changed = recipe("schedule_free_adamw").model_dump(exclude_unset=True)
    changed["optimizer"]["schedule"] = "linear"
    assert shape_of(recipe_from(changed, "r")) == "linear"
    with pytest.raises(IncompatibleTechniques, match="weight_averaging"):
        plan(recipe_from({**changed, "techniques": [{"weight_averaging": {}}]}, "r"))


class Look(pl.Callback):
    """What the optimizer holds after the last step, and the weights that validation and the end see."""

    def __init__(self) -> None:
        self.validated, self.same = {}, True

    def weights(self, module: pl.LightningModule) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        state = trainer.optimizers[0].state
        z = {name: state[p]["z"].clone() for name, p in pl_module.named_parameters()}
        self.y = self.weights(pl_module)
        self.x = {name: averaged_point(y, z[name], 0.9) for name, y in self.y.items()}

    def on_validation_batch_start(self, trainer, pl_module, *args) -> None:
        if not trainer.sanity_checking:
            self.validated = self.weights(pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        self.final = self.weights(pl_module)


def test_a_recipes_run_is_evaluated_at_the_average_and_ends_with_it(tmp_path: Path) -> None:
    values = recipe("schedule_free_adamw", name="single").model_dump(exclude_unset=True)
    values |= {"budget": {"steps": 4}, "tracking": {"ledger": False}}
    look = Look()
    fit(plan(recipe_from(values, "r")), run_dir=tmp_path, callbacks=[look])
    saved = load_weights(tmp_path / "final")
    for name, x in look.x.items():
        assert torch.equal(look.final[name], x) and torch.equal(look.validated[name], x)
        assert torch.equal(saved[name], x) and not torch.equal(x, look.y[name])


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
