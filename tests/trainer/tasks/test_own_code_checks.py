"""A recipe's keys act on modules and data of the user's own, or are refused by name before the first step."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from shoestring.recipes import RecipeError, recipe_from
from shoestring.trainer import fit, plan

pytestmark = pytest.mark.filterwarnings("ignore")
OWN = """
import pytorch_lightning as pl, torch
STEPS = []
class Bare(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, i):
        STEPS.append((len(batch[0]), type(self.trainer.optimizers[0]).__name__))
        return self.layer(batch[0]).square().mean()
class Whole(Bare):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(64, 4)), batch_size=8)
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    (tmp_path / "owned.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "owned", raising=False)

    def run(task: str, **more: Any) -> list[tuple[int, str]]:
        import owned

        owned.STEPS.clear()
        values = {
            "model": {"task": f"owned:{task}"}, "data": {"source": "owned:Data", "batch_size": 8},
            "budget": {"steps": 2}, "strategy": {"name": "single"}, "tracking": {"ledger": False}, **more,
        }  # fmt: skip
        try:
            fit(plan(recipe_from(values, allow_code=True)), run_dir=tmp_path / "run")
        finally:
            steps = list(owned.STEPS)
            run.steps = steps
        return steps

    return run


def test_a_module_without_an_optimizer_trains_with_the_recipes(train):
    assert train("Bare", optimizer={"name": "sgd", "lr": 0.1}) == [(8, "SGD"), (8, "SGD")]


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("Whole", {"optimizer": {"name": "adam"}}, "optimizer.name: found adam; allowed: nothing: owned:Whole"),
        ("Whole", {"optimizer": {"lr": 0.1}}, "optimizer.lr: found 0.1; allowed: nothing: owned:Whole makes its own"),
        ("Whole", {"export": {"to": "hf"}}, "export.to: found hf; allowed: hf for modules whose attribute `model`"),
        ("Whole", {"data": {"source": "owned:Data"}}, "data.batch_size: found 32; allowed: 8, which the loader of"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused_before_the_first_step(train, task, more, said):
    with pytest.raises(RecipeError) as caught:
        train(task, **more)
    assert said in str(caught.value) and train.steps == []
