"""A step in backward: the same weights to the bit, with one gradient alive at a time, or a refusal with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import step_in_backward_ranks as ranks
import torch
from processes import succeed

from shoestring.callbacks import GradualPruning, WeightAveraging
from shoestring.callbacks.contract import IncompatibleTechniques, Settings
from shoestring.recipes import RecipeError, recipe_from
from shoestring.trainer import Trainer, plan
from shoestring.trainer.monitor.nonfinite import NonFiniteSteps
from shoestring.trainer.run.step_in_backward import StepInBackward, in_backward
from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS
from shoestring.trainer.tasks.optimizers.make import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore")


def optimizer_of(net: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    settings = SimpleNamespace(name=name, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, momentum=0.9)
    return build_optimizer(net.named_parameters(), settings)


def trained(name: str, hooked: bool, poison: int | None = None) -> tuple[dict[str, torch.Tensor], int, int]:
    """Weights after three steps, the most bytes of gradients that were alive, and how many steps were not finite.

    poison: the step in which the gradient of the first layer's weight is made infinite.
    """
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Linear(80, 16))
    optimizer, alive, bad = optimizer_of(net, name), [0], []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad.nbytes for q in net.parameters() if q.grad is not None))
        )
    finite = NonFiniteSteps(10, lambda *seen: bad.append(seen))
    if hooked:
        StepInBackward(finite).on_train_start(SimpleNamespace(world_size=1, optimizers=[optimizer]), net)
    for step in range(3):
        loss = net(torch.full((8, 64), 0.1 * (step + 1))).square().mean()
        if step == poison:
            net[0].weight.register_hook(lambda grad: grad * torch.inf)
        loss.backward()
        if not hooked:
            optimizer.step()
            optimizer.zero_grad()
        finite.step_ends(loss, step, 0)
    return {key: value.clone() for key, value in net.state_dict().items()}, max(alive), len(bad)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_the_same_step_to_the_bit(name: str) -> None:
    whole, all_alive, _ = trained(name, hooked=False)
    ours, alive, bad = trained(name, hooked=True)
    assert all(torch.equal(whole[key], ours[key]) for key in whole) and not bad
    assert all_alive == 4 * sum(value.numel() for value in whole.values())
    assert alive == 4 * 64 * 80, "that of the largest matrix alone"


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_told() -> None:
    before, _, _ = trained("adamw", hooked=True)
    after, _, bad = trained("adamw", hooked=True, poison=2)
    assert bad == 1
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert torch.equal(before["2.weight"], after["2.weight"]), "its gradient came before, and was finite"
    assert not torch.equal(before["0.weight"], after["0.weight"])


# -- refusals --------------------------------------------------------------------------------------------------------
def recipe(*techniques: Any, **keys: Any) -> Any:
    values: dict[str, Any] = {
        "model": {"task": "image-classification", "config": {"kind": "mlp", "hidden": [8]}},
        "data": {"source": "digits", "batch_size": 8, **keys.get("data", {})}, "budget": {"steps": 2},
        "optimizer": {"in_backward": True, "clip": None, **keys.get("optimizer", {})},
        "strategy": keys.get("strategy", {"name": "single"}), "techniques": list(techniques),
    }  # fmt: skip
    return recipe_from(values, "r")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optimizer": {"clip": 1.0}}, r"optimizer\.clip: found 1\.0; allowed: null with optimizer\.in_backward"),
        ({"strategy": {"name": "zero2", "devices": 2}}, r"strategy\.name: found 'zero2'; .*ZeRO shares out gradients"),
        ({"data": {"micro_batch_size": 2}}, r"data\.micro_batch_size: found 2; allowed: auto or 8 .*would have to be"),
    ],
)
def test_a_plan_refuses_what_needs_all_gradients(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan(recipe(**keys))


def test_a_plan_refuses_techniques_that_read_gradients_and_takes_others() -> None:
    for technique in ("gradual_pruning", "rigl", "structured_pruning", "low_rank"):
        with pytest.raises(IncompatibleTechniques, match=rf"{technique} reads or changes whole gradients"):
            plan(recipe(technique))
    made = plan(recipe("weight_averaging", strategy={"devices": 2}))
    assert made.strategy == "ddp" and made.micro_batch == 4 and made.accumulate == 1


def test_the_trainer_refuses_the_same() -> None:
    finite = NonFiniteSteps(1, print)
    for changes, said in (
        ({"strategy": "zero1"}, "strategy zero1"),
        ({"settings": Settings(accumulate_grad_batches=2)}, "2 accumulated micro-batches"),
        ({"clip": 1.0}, "clipping by the norm"),
        ({"settings": Settings(precision="16-mixed")}, "precision fp16"),
    ):
        given = {"strategy": "single", "settings": Settings(), "clip": None, "finite": finite} | changes
        with pytest.raises(IncompatibleTechniques, match=said):
            in_backward(**given)
    with pytest.raises(IncompatibleTechniques, match="gradual_pruning reads or changes"):
        Trainer(techniques=[GradualPruning(sparsity=0.5)], step_in_backward=True, accelerator="cpu", ledger=False)
    assert Trainer(techniques=[WeightAveraging()], step_in_backward=True, accelerator="cpu", ledger=False)


# -- runs --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2)])
def test_a_run_is_the_same_to_the_bit_and_resumes_so(strategy: str, world: int, tmp_path: Path) -> None:
    succeed(ranks.main, strategy, tmp_path, world=world, folder=tmp_path, timeout=300)
    for rank in range(world):
        plain, ours, resumed = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert ours["losses"] == plain["losses"] and ours["states"] == plain["states"]
        assert ours["final"] == plain["final"]
        assert resumed["losses"] == ours["losses"][ranks.HALF :]
        assert resumed["states"] == ours["states"] and resumed["final"] == ours["final"]
