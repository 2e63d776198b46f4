"""Rows of other people's data sets: recognised by their columns, one form for all, and refused by row."""

import json

import pytest
from pyarrow import Table, parquet

from shoestring.recipes import load_recipe
from shoestring.trainer.data import sources
from shoestring.trainer.data.errors import TaskError

CHAT = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
TURNS = {"messages": CHAT}
FORMS = {  # a row, and its canonical form
    "messages": (TURNS, TURNS),
    "sharegpt": ({"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}]}, TURNS),
    "alpaca": (
        {"instruction": "Add", "input": "2 and 3", "output": "5"},
        {"messages": [{"role": "user", "content": "Add\n\n2 and 3"}, CHAT[1]]},
    ),
    "prompt-completion": ({"prompt": "2+3=", "completion": "5"}, {"prompt": "2+3=", "completion": "5"}),
    "question-answer": (
        {"question": "2+3?", "answer": "5", "system": "Be short."},
        {"messages": [{"role": "system", "content": "Be short."}, *CHAT]},
    ),
}


@pytest.fixture
def corpus(tmp_path):
    def load(rows, name="rows.jsonl", **data):
        path = tmp_path / name
        if path.suffix == ".parquet":
            parquet.write_table(Table.from_pylist(rows), path)
        elif path.suffix == ".csv":
            cells = [",".join('"' + str(row[key]).replace('"', '""') + '"' for key in rows[0]) for row in rows]
            path.write_text("\n".join([",".join(rows[0]), *cells]))
        else:
            path.write_text("\n".join(map(json.dumps, rows)))
        overrides = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
        recipe = load_recipe("quickstart", [f"data.source={path}", *overrides])
        return sources.load_corpus(recipe.data, str(path), {}, cache=tmp_path / "cache", labelled=False)

    return load


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
@pytest.mark.parametrize("shape", FORMS)
def test_each_shape_is_recognised_in_each_kind_of_file(corpus, shape, name):
    row, canonical = FORMS[shape]
    if name.endswith(".csv"):
        row = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
    for form in ("auto", shape):
        read = corpus([row], name, format=form)
        assert read.shaped and [json.loads(text) for text in read.texts] == [canonical]


def test_a_text_column_is_a_text(corpus):
    read = corpus([{"text": "hello"}])
    assert not read.shaped and list(read.texts) == ["hello"]
    both = [{"text": "hello", "messages": CHAT}]
    with pytest.raises(TaskError, match=r"could be read as text or messages.* Set data.format to plain or messages"):
        corpus(both)
    assert list(corpus(both, format="plain").texts) == ["hello"] and corpus(both, format="messages").shaped


def test_what_a_template_may_need_is_kept(corpus):
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    chat = [
        CHAT[0], {"role": "assistant", "content": None, "tool_calls": call}, {"role": "tool", "content": "5"},
        {"role": "assistant", "content": [{"type": "text", "text": part} for part in ("It ", "is 5")], "weight": 0},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    (text,) = corpus([{"messages": chat, "tools": json.dumps(tools)}]).texts
    assert json.loads(text) == {
        "messages": [
            CHAT[0], {"role": "assistant", "content": "", "tool_calls": call}, chat[2],
            {"role": "assistant", "content": "It is 5", "train": False},
        ],
        "tools": tools,
    }  # fmt: skip


WRONG = {
    "role": (
        [{"role": "asistant", "content": "5"}],
        r"row 2, message 1 has the role 'asistant'. Did you mean 'assistant'",
    ),
    "no answer": (CHAT[:1], "row 2 has no message of the assistant to train on"),
    "empty list": ([], "row 2, 'messages' is an empty list; a list of messages is needed"),
    "text": (["hello"], "row 2, message 1 is a str; {role: …, content: …} is needed"),
    "number": ([{"role": "user", "content": 5}], "row 2, message 1, content, is a number; a text is needed"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        "row 2, message 1 has a part of type 'image_url'; only parts of text are read",
    ),
    "not json": ("[{'role': 'user'}]", "row 2, 'messages' is a text and no JSON"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_row_that_is_no_chat_is_named(corpus, wrong):
    messages, said = WRONG[wrong]
    with pytest.raises(TaskError, match=f"rows.jsonl, {said}"):
        corpus([TURNS, {"messages": messages}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "2+3=", "completion": " "}, "row 1 has an empty answer, so nothing to train on"),
        ({"instruction": "Add", "output": 5}, "data.format: alpaca 'output': .*row 1 is a number, found 5; a text"),
        ({"question": "2+3?", "answer": None}, "data.format: question-answer: .*row 1 has no 'answer'"),
    ],
)
def test_a_row_without_an_answer_is_named(corpus, row, said):
    with pytest.raises(TaskError, match=said):
        corpus([row])


def test_a_named_shape_asks_for_its_columns(corpus):
    with pytest.raises(TaskError, match=r"data.format: 'output' is unknown.*Known: instruction, outptu"):
        corpus([{"instruction": "Add", "outptu": "5"}], format="alpaca")
