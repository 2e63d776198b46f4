"""A trace of as many steps as were asked for, which Perfetto reads, and weights as without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from shoestring.recipes import RecipeError, load_recipe
from shoestring.trainer import fit, plan
from shoestring.trainer.checkpoint.weights import load_weights

pytestmark = pytest.mark.filterwarnings("ignore")

CHANGES = ["techniques=[]", "strategy={name: single}", "tracking.ledger=false", "evaluation={at_end: false}"]
CHANGES += ["data.batch_size=32", "data.micro_batch_size=16"]


def trained(folder: Path, *changes: str) -> None:
    fit(plan(load_recipe("digits", [*CHANGES, *changes])), run_dir=folder)


def test_the_trace_of_three_steps(tmp_path: Path) -> None:
    trained(tmp_path / "traced", "tracking.profile=3 steps", "budget={steps: 7}")
    trained(tmp_path / "plain", "budget={steps: 7}")
    with gzip.open(tmp_path / "traced/profile/rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step#")]
    assert len(steps) == 3
    assert any(event.get("name") == "aten::addmm" for event in events)
    traced, plain = (load_weights(tmp_path / name / "final") for name in ("traced", "plain"))
    assert all((traced[name] == plain[name]).all() for name in plain)
    assert not (tmp_path / "plain/profile").exists()


def test_a_run_that_ends_earlier_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, "tracking.profile=3 steps", "budget={steps: 2}")
    assert "the run ended before step 3, where the trace begins" in caplog.text
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("wrong", ["3 min", "0", "1.5"])
def test_only_whole_steps_are_traced(wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"tracking\.profile"):
        load_recipe("digits", [f"tracking.profile={wrong}"])
