"""Whole runs of tasks with labels: on ranks, to their report, and out as a folder that transformers loads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from labelled_ranks import CASES, HELD, TRAINED, evaluated, rows, shape
from processes import succeed
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig

from shoestring.recipes import RecipeError, recipe_from
from shoestring.trainer import fit, plan
from shoestring.trainer.cli.class_display import show_classes
from shoestring.trainer.export.quality import quality
from shoestring.trainer.export.runtimes import eager
from shoestring.trainer.export.trained import open_run
from shoestring.trainer.export.write import export
from shoestring.trainer.ledger.report import finished_report

pytestmark = pytest.mark.filterwarnings("ignore")
METRIC = {
    "weighed": "val_macro_f1", "several": "val_exact_match", "number": "val_spearman", "words": "val_entity_f1",
    "masked": "val_accuracy", "pairs": "val_accuracy",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("labels")
    for case in CASES:
        (made / f"{case}.jsonl").write_text(rows(case, TRAINED))
        (made / f"{case}-held.jsonl").write_text(rows(case, HELD))
    return made


def test_ranks_and_micro_batches_change_nothing(folder: Path) -> None:
    """Neither what a sample weighs in the gradient, nor what an evaluation counts: 7 samples on 2 ranks."""
    ways = {"one": (1, 8), "two": (2, 2)}
    for name, (ranks, micro) in ways.items():
        succeed(
            partial(evaluated, folder, name, ranks=ranks, micro=micro), world=ranks, folder=folder / f"ranks-{name}"
        )
    for case in set(CASES) - {"masked"}:  # whose masks a run of its own draws: below
        one, two = (load_file(folder / f"{name}-{case}.safetensors") for name in ways)
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6, case
    for case in CASES:
        one, two = (json.loads((folder / f"{name}-{case}.json").read_text()) for name in ways)
        assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-4, abs=1e-6), case
        assert one["details"] == two["details"]
        if case == "weighed":
            assert sum(map(sum, one["details"]["confusion_matrix"])) == HELD, "every sample once"


@pytest.mark.parametrize("case", CASES)
def test_a_run_reports_and_leaves(case: str, folder: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": {**CASES[case], "config": shape(case), "tokenizer": {"train": "bpe", "vocab_size": 300}},
        "data": {"source": str(folder / f"{case}.jsonl"), "validation": str(folder / f"{case}-held.jsonl"),
                 "batch_size": 4, "sequence_length": 32},
        "budget": {"steps": 4}, "strategy": {"name": "single"}, "tracking": {"ledger": False},
        "goal": {"metric": METRIC[case], "above": 2.0}, "checkpoint": {"best": f"max {METRIC[case]}"},
        "evaluation": {"every": "2 steps"}, "export": {"to": "hf"},
    }  # fmt: skip
    recipe = recipe_from(values, case)
    report = fit(plan(recipe), run_dir=tmp_path / "run")
    assert report is not None and report.goal_reached is False
    measured = report.summary["metrics"]
    assert METRIC[case] in measured and report.summary["best"]["metric"] == METRIC[case]
    again = finished_report(tmp_path / "run", recipe)
    assert again is not None and again.as_dict().get("details") == report.as_dict().get("details")
    assert ("confusion_matrix" in report.details) == (case in ("weighed", "words"))
    shown = Console(record=True, width=100, file=(tmp_path / "shown").open("w"))
    show_classes(report.details, shown)
    assert ("confusion matrix" in shown.export_text()) == (case in ("weighed", "words"))

    trained = open_run(tmp_path / "run")
    made = export(trained, "hf", out=tmp_path / "out")
    assert made.error == 0
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == [type(trained.model).__name__]
    if "classes" in report.details:
        assert list(config.label2id) == list(report.details["classes"])
    worth = quality(eager(trained.model), trained)
    for name in (
        ("exact_match", "spearman") if case in ("several", "number") else ("macro_f1",) if case == "words" else ()
    ):
        assert worth.get(name, measured.get(f"val_{name}")) == pytest.approx(measured.get(f"val_{name}"), abs=1e-6)


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (
            {"problem": "regression"},
            {},
            r"model\.problem: found 'regression'; allowed: single-label for python-packages",
        ),
        ({"task": "causal-lm", "problem": "multi-label"}, {}, "single-label for causal-lm"),
        ({"class_weights": "balanced", "problem": "regression"}, {"source": "x.csv"}, "class_weights.*null for"),
        ({"class_weights": "equal"}, {}, "class_weights: found 'equal'; allowed: null, balanced"),
        ({"class_weights": [1, 0]}, {}, "class_weights"),
        ({"task": "masked-lm", "chunked_loss": True}, {}, r"chunked_loss: found True; allowed: auto \| false"),
        ({"task": "masked-lm"}, {"mask_share": 0}, "mask_share: found 0; allowed: a number above 0"),
        (
            {"task": "token-classification"},
            {},
            "source: found 'python-packages'; allowed: for token-classification: data of your own",
        ),
        ({"task": "token-clasification"}, {"source": "x.csv"}, "did you mean token-classification"),
    ],
)
def test_what_does_not_go_together_is_refused(model: dict[str, Any], data: dict[str, Any], said: str) -> None:
    values = {
        "model": {"task": "sequence-classification", "name": "minilm", **model},
        "data": {"source": "python-packages", **data}, "budget": {"steps": 1},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=said):
        recipe_from(values, "r")
