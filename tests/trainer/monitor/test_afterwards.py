"""What a run does with its final weights is on its bill, and the bill is by a clock that nobody sets."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from finished import RECIPES

from shoestring.recipes import recipe_from
from shoestring.trainer import fit, plan
from shoestring.trainer.cli.app import _seconds_alive
from shoestring.trainer.ledger import read_summary

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_second_from_the_call_to_its_end_is_in_a_window(tmp_path: Path) -> None:
    values = {
        **RECIPES["gpt2"], "budget": {"steps": 2}, "strategy": {"name": "single"}, "export": {"to": "hf"},
        "evaluation": {"generate": "def"}, "tracking": {"ledger": False},
    }  # fmt: skip
    planned = plan(recipe_from(values, "billed"))
    began = time.monotonic()
    report = fit(planned, run_dir=tmp_path)
    wall = time.monotonic() - began
    assert report is not None and report.sample is not None and (tmp_path / "model" / "config.json").exists()
    windows, seconds = report.summary["windows"], report.summary["seconds"]
    print({name: round(value, 2) for name, value in windows.items()}, round(wall, 2))
    assert windows["report"] > 0 and windows["evaluation"] > 0
    assert sum(windows.values()) == pytest.approx(seconds, abs=0.1)
    assert 0.9 * wall - 0.5 < seconds < wall + 0.1
    assert read_summary(tmp_path)["windows"]["report"] == windows["report"]


def test_a_system_clock_that_jumps_is_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _seconds_alive()
    honest = time.time
    monkeypatch.setattr(time, "time", lambda: honest() + 86400.0)
    assert before <= _seconds_alive() < before + 60
