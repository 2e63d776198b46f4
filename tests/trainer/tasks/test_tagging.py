"""Classes of words: their first tokens have them, and what is measured are words and entities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from shoestring.trainer.data.carried import resolve_name
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.receipt import receipt
from shoestring.trainer.tasks import Task
from shoestring.trainer.tasks.entities import are_entity_tags, entities

WAYS, TIMES = ("go", "walk", "run", "fly", "ride"), ("now", "soon", "untowardly")
TOWNS = ("Rome", "San Marino", "Unterschleissheim", "Oslo")
SHAPE = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def rows(count: int) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        town = TOWNS[i % 4].split()
        words = [WAYS[i % 5], "to", *town, TIMES[i % 3]]
        made.append({"tokens": words, "tags": ["O", "O", "B-TOWN", *["I-TOWN"] * (len(town) - 1), "O"]})
    return made


def task(tiny: Any, folder: Path, given: list[dict[str, Any]], tokenizer: Any, length: int = 32) -> Task:
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, given)))
    return tiny.task(
        model={"task": "token-classification", "config": SHAPE, "tokenizer": tokenizer},
        data={"source": str(folder / "words.jsonl"), "text_column": "tokens", "label_column": "tags", "limit": None,
              "sequence_length": length, "validation": 0.25},
        optimizer={"lr": 3e-3},
    )  # fmt: skip


@pytest.mark.parametrize("length", [32, 6])
def test_first_tokens_have_the_class_of_their_word(tiny: Any, tmp_path: Path, length: int) -> None:
    """As transformers' own `word_ids` would put them, for texts that are cut, too."""
    given = rows(16)
    made = task(tiny, tmp_path, given, "minilm", length)
    tokenizer = AutoTokenizer.from_pretrained(resolve_name("minilm"))
    wanted = set()
    for row in given:
        ids = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=length)
        words = ids.word_ids()
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        numbers = {name: number for number, name in enumerate(made.facts["classes"])}
        labels = [numbers[row["tags"][w]] if new else -100 for w, new in zip(words, first, strict=True)]
        wanted.add((tuple(ids["input_ids"]), tuple(labels)))
    samples = [*(made.train[i] for i in range(len(made.train)))]
    samples += [made.validation[i] for i in range(len(made.validation))]
    assert {(tuple(s["input_ids"].tolist()), tuple(s["labels"].tolist())) for s in samples} == wanted
    counts = [int((made.train[i]["labels"] != -100).sum()) for i in range(len(made.train))]
    assert made.train.target_counts.tolist() == counts


def test_towns_are_found(tiny: Any, tmp_path: Path) -> None:
    made = task(tiny, tmp_path, rows(60), {"train": "bpe", "vocab_size": 400})
    assert made.facts["classes"] == ["B-TOWN", "I-TOWN", "O"]
    tiny.fit(made, 100)
    metrics = tiny.validate(made)
    right = words = 0
    rights = wants = founds = 0
    module = made.module.eval()
    for i in range(len(made.validation)):
        batch = made.collate([made.validation[i]])
        labelled = batch["labels"] != -100
        with torch.no_grad():
            guess = module(batch).argmax(-1)[labelled]
        labels = batch["labels"][labelled]
        right, words = right + int((guess == labels).sum()), words + len(labels)
        spans = [entities([made.facts["classes"][n] for n in numbers.tolist()]) for numbers in (guess, labels)]
        rights, founds, wants = rights + len(spans[0] & spans[1]), founds + len(spans[0]), wants + len(spans[1])
    assert metrics["val_accuracy"] == pytest.approx(right / words, abs=1e-6)
    assert metrics["val_entity_f1"] == pytest.approx(2 * rights / (founds + wants), abs=1e-6)
    assert metrics["val_entity_f1"] > 0.8, "nothing was learnt"
    assert sum(row["samples"] for row in made.details["classes"].values()) == words
    shown = receipt(made.prepared)
    assert shown.classes["B-TOWN"] == len(made.train) and 0 < shown.trained_share <= 1


def test_entities_by_hand() -> None:
    tags = ["B-A", "I-A", "O", "I-B", "I-B", "B-B", "I-A", "B-A"]
    assert entities(tags) == {("A", 0, 2), ("B", 3, 5), ("B", 5, 6), ("A", 6, 7), ("A", 7, 8)}
    assert entities([]) == entities(["O"]) == set()
    assert are_entity_tags(["O", "B-A"]) and not are_entity_tags(["O", "NOUN"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"row 3 has 2 words and 1 labels; each word needs one"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "'tokens' is a text and no JSON"),
        ({"tokens": [], "tags": []}, "'tokens': .*row 3 is a list; a list of words is needed"),
        ({"tokens": ["a"], "tags": "O"}, r"'tags': .*row 3 is a str, found O; a list with one class"),
        ({"tokens": ["a b", ""], "tags": ["O", "B-X"]}, None),
    ],
)
def test_a_row_that_is_no_list_of_words_is_named(tiny: Any, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    given = rows(12)
    given[2] = row
    if said is None:
        made = task(tiny, tmp_path, given, {"train": "bpe", "vocab_size": 300})
        assert sum(made.prepared.train.target_counts) > 0
        return
    with pytest.raises(TaskError, match=said):
        task(tiny, tmp_path, given, {"train": "bpe", "vocab_size": 300})
