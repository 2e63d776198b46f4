"""Columns under the names that files give them, and Arrow files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import feather

from shoestring.recipes import RecipeError, load_recipe
from shoestring.trainer.data.corpora import Corpus
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.sources import load_corpus


def corpus(path: Path, *, labelled: bool = False, **data: Any) -> Corpus:
    changes = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    recipe = load_recipe("quickstart", [f"data.source={path}", *changes])
    return load_corpus(recipe.data, str(path), {}, cache=path.parent / "cache", labelled=labelled)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    row = {"content": "hello", "category": "x", "text": "not this", "ask": "2+3?", "reply": "5", "who": "Be short."}
    path.write_text(json.dumps(row))
    return path


def test_columns_have_the_names_that_the_files_give_them(rows: Path) -> None:
    read = corpus(rows, labelled=True, columns={"text": "content", "label": "category"})
    assert (list(read.texts), read.labels) == (["hello"], ["x"])
    both = {"question": "ask", "answer": "reply", "system": "who"}
    with pytest.raises(TaskError, match="could be read as text or question-answer"):
        corpus(rows, columns=both)
    (chat,) = corpus(rows, columns=both, format="question-answer").texts
    assert [message["content"] for message in json.loads(chat)["messages"]] == ["Be short.", "2+3?", "5"]
    (pair,) = corpus(rows, columns={"prompt": "ask", "completion": "text"}).texts  # a name of ours for another column
    assert json.loads(pair) == {"prompt": "2+3?", "completion": "not this"}


def test_a_column_that_is_not_there_is_named_with_those_that_are(rows: Path) -> None:
    with pytest.raises(TaskError, match=r"row 1: data\.columns\.answer: 'replly' .*mean 'reply'\? Known: ask, cat"):
        corpus(rows, columns={"question": "ask", "answer": "replly"})
    with pytest.raises(RecipeError, match=r"data\.columns\.txt: .*did you mean text"):
        corpus(rows, columns={"txt": "content"})
    with pytest.raises(RecipeError, match=r"data\.text_column: .*exactly one of text_column and columns\.text"):
        corpus(rows, columns={"text": "content"}, text_column="reply")


def test_arrow_files_of_either_kind_and_folders_of_markdown(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(2500)]
    table = pyarrow.table({"n": list(range(2500)), "text": texts})
    feather.write_feather(table, tmp_path / "a.feather")
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=700)
    for name in ("a.feather", "b.arrow"):
        read = corpus(tmp_path / name, limit=None)
        assert list(read.texts) == texts and read.texts[1000] == "text 1000" and read.texts[-1] == "text 2499"
        assert read.take([2400, 3, 1999]).texts[0:3] == ["text 2400", "text 3", "text 1999"]
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    for name in ("a.md", "b.txt", "deep/c.markdown"):
        (tmp_path / "notes" / name).write_text(name)
    assert list(corpus(tmp_path / "notes").texts) == ["a.md", "b.txt", "deep/c.markdown"]
