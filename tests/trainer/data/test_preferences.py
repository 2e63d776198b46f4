"""Rows of preferences: read in every shape, cut into prompts and answers, held out by prompt, refused by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import preferred
import pytest
from rich.console import Console

from shoestring.recipes import Recipe, RecipeError
from shoestring.trainer.cli.receipt_display import show_receipt
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.preference_shapes import PREFERENCES
from shoestring.trainer.data.preferences import Preferences, prepare_preferences
from shoestring.trainer.data.rows import Place
from shoestring.trainer.data.token_store import IGNORED
from shoestring.trainer.run.receipt import receipt_of

pytestmark = pytest.mark.filterwarnings("ignore")
USER = {"role": "user", "content": "2+3?"}
FIVE, SIX = ({"role": "assistant", "content": said} for said in ("5", "6"))
TEXTS = {"prompt": "2+3=", "chosen": "5", "rejected": "6"}
CHATS = {"prompt": [USER], "chosen": [FIVE], "rejected": [SIX]}


def recipe(folder: Path, rows: list[dict[str, Any]], loss: str = "dpo", **sections: Any) -> Recipe:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return preferred.recipe(folder, loss, **{**sections, "data": {"source": str(source), **sections.get("data", {})}})


def prepared(folder: Path, rows: list[dict[str, Any]], loss: str = "dpo", **sections: Any) -> Any:
    return prepare_preferences(recipe(folder, rows, loss, **sections), folder / "cache")


@pytest.mark.parametrize(
    ("row", "canonical"),
    [
        (TEXTS, TEXTS),
        ({"chosen": "2+3= 5", "rejected": "2+3= 6"}, {"prompt": "2+3=", "chosen": " 5", "rejected": " 6"}),
        (CHATS, CHATS),
        ({"chosen": [USER, FIVE], "rejected": [USER, SIX]}, CHATS),
        ({"prompt": [USER], "chosen": [USER, FIVE], "rejected": [USER, SIX]}, CHATS),
        ({"prompt": "2+3?", "chosen": [USER, FIVE], "rejected": [USER, SIX]}, CHATS),
        ({"prompt": "2+3?", "chosen": [FIVE], "rejected": [SIX]}, CHATS),
        ({name: json.dumps(value) for name, value in CHATS.items()}, CHATS),
        ({"prompt": "2+3=", "completion": "5", "label": "True"}, {"prompt": "2+3=", "completion": "5", "label": True}),
        ({"prompt": "2+3?", "completion": [SIX], "label": 0}, {"prompt": [USER], "completion": [SIX], "label": False}),
    ],
)  # fmt: skip
def test_each_shape_has_one_form(row: dict[str, Any], canonical: dict[str, Any]) -> None:
    shape = PREFERENCES["unpaired-preference" if "label" in row else "preference"]
    assert json.loads(shape.canonical(Place("rows.jsonl", 1), row)) == canonical


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**TEXTS, "rejected": "5"}, "chosen and rejected are alike"),
        ({**TEXTS, "rejected": " "}, "rejected has an empty answer"),
        ({**TEXTS, "chosen": [FIVE]}, "one is a text and the other a list"),
        ({**TEXTS, "chosen": None}, "chosen, is missing; a text or a list of messages"),
        ({**CHATS, "chosen": [USER]}, "chosen has an empty answer"),
        ({"prompt": "2", "completion": "3", "label": "good"}, "label, is 'good'; true"),
        ({"prompt": [USER], "completion": "3", "label": True}, "the prompt is a list of messages, and completion is"),
        ({"question": "2", "answer": "3"}, "needed are chosen and rejected; or prompt and completion and label"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_from_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=said) as error:
        prepared(tmp_path, [row])
    assert "rows.jsonl, row 1" in str(error.value) or "columns" in str(error.value)


def texts(made: Any, sample: int) -> list[tuple[str, str]]:
    """Both documents of a sample, each as (what is read, what of it is weighed)."""
    texts = []
    for which in (0, 1):
        document = made.train.document(sample, which)
        weighed = document["input_ids"][document["labels"] != IGNORED]
        texts.append((made.tokenizer.decode(document["input_ids"]), made.tokenizer.decode(weighed)))
    return texts


def test_answers_and_their_ends_are_weighed_and_prompts_are_not(tmp_path: Path) -> None:
    end = "<|endoftext|>"
    made = prepared(tmp_path, [TEXTS], data={"validation": 0.0})
    assert texts(made, 0) == [(f"2+3=5{end}", f"5{end}"), (f"2+3=6{end}", f"6{end}")]
    chat = prepared(tmp_path, [CHATS], data={"validation": 0.0})
    assert [weighed for _, weighed in texts(chat, 0)] == [f"5{end}", f"6{end}"]
    assert chat.train[0]["input_ids"].shape[0] == 2


def test_kto_takes_pairs_apart_and_puts_answers_after_other_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f" good{i}", "rejected": f" bad{i}"} for i in range(3)]
    made = prepared(tmp_path, rows, "kto", data={"validation": 0.0})
    assert made.train.wanted.tolist() == [True, False] * 3
    first = [read.removesuffix("<|endoftext|>") for read, _ in texts(made, 0)]
    assert first == ["0? good0", "0? good2"], "the row before the first is the last"
    assert [read.removesuffix("<|endoftext|>") for read, _ in texts(made, 3)] == ["1? bad1", "1? bad0"]
    single = [{"prompt": "1?", "completion": " a", "label": True}, {"prompt": "2?", "completion": " b", "label": False}]
    made = prepared(tmp_path, single, "kto", data={"validation": 0.0})
    assert [read for read, _ in texts(made, 1)] == ["2? b<|endoftext|>", "2? a<|endoftext|>"]
    with pytest.raises(TaskError, match="rows are single answers, each with a label, and loss dpo takes pairs"):
        prepared(tmp_path, single, "dpo")


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 5}?", "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(20)]
    made = prepared(tmp_path, rows, data={"validation": 0.2})
    prompts = [
        {made.tokenizer.decode(data.document(i, 0)["input_ids"]).split("?")[0] for i in range(len(data))}
        for data in (made.train, made.validation)
    ]
    assert len(prompts[1]) == 1 and not prompts[0] & prompts[1]


def test_a_pair_that_is_cut_down_to_its_prompt_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [TEXTS, {**TEXTS, "prompt": "a long question of many tokens " * 9}, {**TEXTS, "rejected": "6 " * 40}]
    made = prepared(tmp_path, rows, data={"validation": 0.0, "sequence_length": 24})
    assert len(made.train) == 2 and made.facts["rows_without_target"] == 1 and made.facts["rows_cut"] == 1
    assert made.train[1]["input_ids"].shape == (2, 24)
    with pytest.raises(TaskError, match="no row has an answer within so many tokens"):
        prepared(tmp_path, rows[1:2], data={"validation": 0.0, "sequence_length": 24})


def test_the_receipt_shows_both_answers(tmp_path: Path) -> None:
    receipt = receipt_of(recipe(tmp_path, preferred.rows(20), data={"validation": 0.2}), tmp_path / "run")
    assert receipt.samples == receipt.documents == 16 and 0 < receipt.trained_share < 1 and receipt.duplicates == 0
    console = Console(record=True, width=120, no_color=True)
    show_receipt(receipt.as_dict(), console)
    said = console.export_text()
    assert "rejected" in said and "16 samples to train on" in said


def test_the_docstrings_of_the_standard_library_are_pairs(tmp_path: Path) -> None:
    made = prepared(tmp_path, [TEXTS], data={"source": "docstring-preferences", "limit": 40, "sequence_length": 128})
    assert isinstance(made.train, Preferences) and len(made.train) + len(made.validation) == 40
    (chosen, good), (rejected, bad) = texts(made, 0)
    assert chosen.startswith("def ") and chosen.split('"""')[0] == rejected.split('"""')[0]
    assert sorted(good.removesuffix("<|endoftext|>").split()) == sorted(bad.removesuffix("<|endoftext|>").split())


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"preference": {"loss": "ipo", "margin": 2.0}}}, "margin for loss simpo"),
        ({"model": {"task": "reward-model"}}, "null for reward-model"),
        ({"model": {"adapter": {"start": "pissa"}}}, "pissa changes the base"),
        ({"model": {"adapter": {"start": "loftq"}, "dtype": "nf4"}}, "loftq changes the base"),
        ({"data": {"train_on": "all"}}, "answers | last for preference"),
        ({"techniques": ["sequence_length_warmup"]}, "a sample is two answers"),
        ({"data": {"source": "python-stdlib"}}, "for preference: docstring-preferences"),
        ({"goal": {"metric": "val_perplexity", "below": 3}}, "what preference logs: val_loss"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_before_anything_is_read(
    sections: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        preferred.recipe(tmp_path, "dpo", **sections)
    assert said in str(error.value)
