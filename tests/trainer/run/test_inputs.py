"""A run that goes on is the run that began: what differs is named, and its tokenizer is its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished import RECIPES

from shoestring.recipes import recipe_from
from shoestring.trainer import fit, plan
from shoestring.trainer.data.tokenizers import tokenizer_key
from shoestring.trainer.export.trained import open_run
from shoestring.trainer.run.inputs import ChangedInputs, keep_or_compare

pytestmark = pytest.mark.filterwarnings("ignore")


def write_texts(folder: Path, word: str) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{word} {number} and some more {word}s. " * 40)


def test_other_text_under_the_same_recipe_is_named_and_the_tokenizer_stays(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", "apple")
    values = {
        **RECIPES["gpt2"],
        "data": {**RECIPES["gpt2"]["data"], "source": str(tmp_path / "texts" / "*.txt"), "limit": None},
        "strategy": {"name": "single"}, "tracking": {"ledger": False}, "evaluation": {"at_end": False},
    }  # fmt: skip
    run_dir = tmp_path / "run"
    fit(plan(recipe_from({**values, "budget": {"steps": 2}}, "fruit")), run_dir=run_dir)
    kept = tokenizer_key(open_run(run_dir).task.tokenizer)
    write_texts(tmp_path / "texts", "quince")
    longer = plan(recipe_from({**values, "budget": {"steps": 4}}, "fruit"))
    with pytest.raises(ChangedInputs, match=r"differs in: data \(.* before, .* now\)\. Say --accept-changes"):
        fit(longer, run_dir=run_dir)
    report = fit(longer, run_dir=run_dir, accept_changes=True)
    assert report is not None and report.summary["resumed_from"] == 2 and report.summary["steps"] == 4
    assert tokenizer_key(open_run(run_dir).task.tokenizer) == kept, "weights and tokens belong together"


def test_versions_and_code_are_named_once_something_was_trained(tmp_path: Path) -> None:
    before, now = {"version of torch": "2.11", "code of own": "aa"}, {"version of torch": "2.12", "code of own": "bb"}
    for inputs in (now, before):  # nothing has been trained: the newest counts
        assert keep_or_compare(tmp_path, inputs, None, accept=False, first=True) == []
    assert json.loads((tmp_path / "inputs.json").read_text()) == before
    (tmp_path / "checkpoints" / "000000001").mkdir(parents=True)
    assert keep_or_compare(tmp_path, before, None, accept=False, first=True) == []
    named = ["code of own (aa before, bb now)", "version of torch (2.11 before, 2.12 now)"]
    with pytest.raises(ChangedInputs) as error:
        keep_or_compare(tmp_path, now, None, accept=False, first=True)
    assert all(name in str(error.value) for name in named)
    assert keep_or_compare(tmp_path, now, None, accept=True, first=True) == named
