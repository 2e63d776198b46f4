"""`compress --with`: a finished run's model trained on by another recipe, then made smaller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import finished
from shipped import leave_own_data
from typer.testing import CliRunner

from shoestring.recipes import Recipe, recipe_from, shipped_recipes
from shoestring.recipes.load import load_recipe
from shoestring.trainer.cli.app import app
from shoestring.trainer.export.runtimes import eager, sample
from shoestring.trainer.export.trained import CannotExport, open_run
from shoestring.trainer.planning.planner import plan
from shoestring.trainer.run.retrain import recipe_for, retrained

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


def written(name: str, *techniques: dict[str, Any], steps: int = 4, lr: float = 1e-3) -> Recipe:
    """A recipe to lay over a run: its own model and data never count."""
    return recipe_from({
        "model": {"task": "image-classification", "config": {"kind": "mlp"}}, "data": {"source": "digits"},
        "budget": {"steps": steps}, "optimizer": {"lr": lr, "weight_decay": 0.0}, "techniques": list(techniques),
        "goal": {"metric": "val_accuracy", "above": 0.1},
    }, name)  # fmt: skip


def logits(run: Path, of: Path) -> torch.Tensor:
    """The logits of the model of `run` for held-out samples of the run `of`."""
    return eager(open_run(run).model)(sample(open_run(of)))


@pytest.mark.parametrize("name", ["bert", "llama", "digits"])
def test_training_starts_from_the_runs_own_weights(name: str, runs: Path) -> None:
    run = finished(name, runs)
    home = retrained(open_run(run), written("hardly", steps=1, lr=1e-12))
    assert home == run.resolve() / "compress" / "hardly"
    torch.testing.assert_close(logits(home, run), logits(run, run), rtol=1e-4, atol=1e-5)


def test_the_run_keeps_model_task_and_data_and_takes_the_rest_from_the_recipe(runs: Path) -> None:
    trained = open_run(finished("bert", runs))
    over = written("over", {"low_rank": {"budget": 0.6}}, {"distillation": {"teacher": "elsewhere", "weight": 0.3}})
    made = recipe_for(trained, over, Path("/start"))
    assert (made.name, made.data, made.model.task) == ("over", trained.recipe.data, trained.recipe.model.task)
    assert (made.model.name, made.model.config, made.model.tokenizer) == ("/start", None, None)
    assert (made.goal, made.budget.steps, made.optimizer) == (None, 4, over.optimizer)
    assert made.techniques[0] == over.techniques[0]
    assert made.techniques[1].settings == {"teacher": "/start", "weight": 0.3}
    assert recipe_for(trained, over, None).techniques[1].settings["teacher"] == "initial"


def test_one_command_trains_shrinks_and_compares(runs: Path, tmp_path: Path) -> None:
    run = finished("bert", runs)
    over = written("small", {"structured_pruning": {"ratio": 0.5, "at": "25%", "round_to": 1}},
                   {"distillation": {"hidden": 1.0, "teacher_dtype": "float32"}},
                   {"quantization_aware": {"activation_bits": 8, "start": "50%"}})  # fmt: skip
    path = tmp_path / "small.json"
    path.write_text(json.dumps(over.model_dump(mode="json")))
    command = ["compress", str(run), "--budget-bytes", "40kB", "--with", str(path), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    before, chosen = report["before"][0], next(t for t in report["tried"] if t["name"] == report["chosen"])
    assert before["name"] == "before" and before["accuracy"] is not None and before["latency_ms"] > 0
    assert chosen["bytes"] <= 40e3 < before["bytes"]
    assert report["path"] == str(run.resolve() / "compress" / "small" / "export" / "compressed")
    home = run.resolve() / "compress" / "small"
    sizes = [sum(p.numel() for p in open_run(each).model.parameters()) for each in (home, run)]
    assert sizes[0] < sizes[1]
    lines: list[str] = []
    assert retrained(open_run(run), load_recipe(path), say=lines.append) == home
    assert lines == [f"{home} is finished and is used as it is"]
    with pytest.raises(CannotExport, match="structured_pruning has cut the model"):
        retrained(open_run(home), over)


def test_a_start_that_is_no_longer_the_runs_is_refused(runs: Path, tmp_path: Path) -> None:
    run, over = finished("digits", runs), written("again", steps=1)
    home = retrained(open_run(run), over)
    assert home is not None
    (home / "began-with.txt").write_text("other")
    with pytest.raises(CannotExport, match="started from other weights"):
        retrained(open_run(run), over)


def test_overrides_need_a_recipe(runs: Path) -> None:
    done = CliRunner().invoke(
        app, ["compress", str(finished("digits", runs)), "budget.steps=3", "--budget-bytes", "1MB"]
    )
    assert "budget.steps=3 changes a recipe, but no recipe was given" in str(done.exception)


CONFIGS = {
    "quickstart": {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 128, "vocab_size": 2048},
    "finetune-minilm": {"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384, "vocab_size": 30522},
}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_techniques_of_a_shipped_recipe_go_together(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run, config in CONFIGS.items():  # what the recipes before it leave behind, as far as a plan looks at it
        folder = tmp_path / "runs" / run / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    leave_own_data(tmp_path, classes=2)
    recipe = load_recipe(name)
    made = plan(recipe)
    assert {spec.name for spec in recipe.techniques} < {t.card.name for t in made.techniques}
    cnn = (recipe.model.config or {}).get("kind") == "cnn"  # whose size shows when it is built
    assert bool(made.predictions["parameters"]) != cnn
