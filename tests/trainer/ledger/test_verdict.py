"""A run whose figures make no sense is no success, on the command line and in its files."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest
from command_line import command

from shoestring.trainer.ledger.verdict import problems

pytestmark = pytest.mark.filterwarnings("ignore")
FINE = {"metrics": {"val_loss": 1.0}, "budget": {"steps": 10, "usd": 2.0}, "steps": 10, "usd": 2.1}
GOAL = {"goal": {"metric": "val_los", "above": None, "below": 1.0}, "goal_reached": None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ()),
        ({"metrics": {"val_loss": 1.0, "val_perplexity": float("nan")}}, ("val_perplexity is nan",)),
        ({"metrics": {"val_loss": float("inf")}}, ("val_loss is inf",)),
        (GOAL, ("goal.metric val_los was never measured; the metrics are val_loss (did you mean val_loss?)",)),
        ({"usd": 168.0}, ("8400% of budget.usd (2) was spent",)),
        ({"goal": GOAL["goal"], "goal_reached": False}, ()),
    ],
)
def test_what_keeps_a_run_from_being_a_success(changes: dict, words: tuple[str, ...]) -> None:
    lines = problems(FINE | changes)
    assert len(lines) == len(words) and all(word in text for word, text in zip(words, lines, strict=True))


OWN = dedent("""
    import torch
    from pytorch_lightning import LightningModule
    from torch.utils.data import Dataset

    class Rows(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"x": torch.full((2,), float(index))}

    def rows():
        return Rows(), Rows()

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch["x"]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.layer(batch["x"]).mean() * torch.nan)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)
""")


def test_a_metric_that_is_no_number_ends_in_failure_and_strict_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_of_the_verdict_test.py").write_text(OWN)
    Path("r.yaml").write_text(
        "model: {task: 'own_of_the_verdict_test:Model'}\n"
        "data: {source: 'own_of_the_verdict_test:rows', batch_size: 4}\n"
        "budget: {steps: 3}\nstrategy: {name: single}\n"
    )
    words = ["train", "r.yaml", "--allow-code", "--run-dir", "run", "--json", "out.json"]
    for _ in range(2):  # and again, when it is only shown
        assert command(monkeypatch, *words) == 1
        assert capsys.readouterr().err.strip().endswith("error: val_loss is nan: " + WHY)
        for path in ("out.json", "run/report.json", "run/summary.json"):
            strict = json.loads(Path(path).read_text(), parse_constant=pytest.fail)
            assert strict.get("summary", strict)["metrics"]["val_loss"] is None


WHY = "the model computes no numbers that it could be judged by"


def test_a_misspelt_goal_and_a_budget_that_startup_exceeds_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    begin = ["train", "digits", "strategy.name=single"]
    assert command(monkeypatch, *begin, "budget={steps: 3}", "goal={metric: val_acuracy, above: 0.9}") == 2
    assert "found val_acuracy; allowed: what image-classification logs: val_loss" in capsys.readouterr().err
    assert command(monkeypatch, *begin, "budget={hours: 1e-7}", "--run-dir", "second") == 2
    assert "not one step fits" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*/final"))
