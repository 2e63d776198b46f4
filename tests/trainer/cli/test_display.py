"""What the terminal shows of runs: which loss it is, and how long there is to go."""

from __future__ import annotations

from pathlib import Path

import pytest
import small

from shoestring.trainer.cli import display
from shoestring.trainer.cli.display import Bar, show_runs
from shoestring.trainer.ledger import RunIdentity
from shoestring.trainer.ledger.runs import RunRow


def test_validation_and_training_loss_stand_apart(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(display, "console", display.Console(width=200))
    rows = [({"val_loss": 1.25, "loss": 2.5}, "both"), ({"loss": 3.5}, "only")]
    show_runs([RunRow(id=name, name=name, run_dir="", metrics=metrics) for metrics, name in rows])
    header, both, only = capsys.readouterr().out.splitlines()
    assert "val loss" in header and "train loss" in header
    assert "1.250" in both and "2.500" in both
    assert "3.500" in only and header.index("train loss") <= only.index("3.500") < header.index("tokens")


def test_the_bar_says_how_long_there_is_to_go() -> None:
    bar = Bar({"steps": 100})
    bar.step({"step": 10, "progress": 0.1, "seconds": 7.0, "horizon": 100})
    bar.step({"step": 30, "progress": 0.3, "seconds": 11.0, "horizon": 100})
    assert bar._text().endswith("about 14.0 s to go")  # 4 s for a fifth, and 70 % are left
    in_time = Bar({"hours": 1.0})
    for row in ({"progress": 0.1, "seconds": 7.0}, {"progress": 0.3, "seconds": 11.0}):
        in_time.step(row)
    assert "to go" not in in_time._text() and "left" in in_time._text()


@pytest.mark.filterwarnings("ignore")
def test_a_python_run_is_called_as_its_folder_or_its_module(tmp_path: Path, monkeypatch) -> None:
    small.train(tmp_path / "ablation-3", max_steps=1)
    assert RunIdentity.load(tmp_path / "ablation-3").name == "ablation-3"
    monkeypatch.chdir(tmp_path)
    trainer = small.train(None, max_steps=1)  # type: ignore[arg-type]
    home = Path(trainer.summary["run_dir"])
    assert RunIdentity.load(home).name == "Small" and home.name.startswith("Small-")
