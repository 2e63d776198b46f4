"""Broken files of data: each gives one line that names the file, the row and the way out, or is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pytest
from pyarrow import parquet

from shoestring.recipes import load_recipe
from shoestring.trainer import fit, plan
from shoestring.trainer.data import rows
from shoestring.trainer.data.corpora import Corpus
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.prepare import prepare
from shoestring.trainer.data.sources import load_corpus
from shoestring.trainer.run.receipt import receipt_of

GOOD = '{"text": "a", "label": "x"}\n'
CHAT = {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]}


def chats(*others: Any) -> str:
    return "\n".join(json.dumps(row) for row in (CHAT, *others))


def pairs(*completions: Any) -> str:
    return "\n".join(json.dumps({"prompt": "2+3=", "completion": each}) for each in completions)


def instructions(**other: Any) -> str:
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    return "\n".join(json.dumps(each) for each in (row, row | other))


def truncated_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])


def cut_arrow(path: Path) -> None:
    batch = pyarrow.RecordBatch.from_pydict({"text": ["a" * 100] * 100})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    path.write_bytes(path.read_bytes()[:-2000])


class Broken(NamedTuple):
    """A file's name and what is in it, what is said of it, and what is counted with `bad_rows: skip`.

    counted: None where the whole file is refused; empty where no row is left.
    """

    name: str
    content: str | bytes | Callable[[Path], None]
    said: str
    counted: dict[str, int] | None = None
    labelled: bool = False


FILES = {
    "torn line": Broken("a.jsonl", GOOD + '{"text": "b\n' + GOOD, r"line 2 is not JSON: .* Fix", {"not JSON": 1}),
    "deep nesting": Broken("a.jsonl", GOOD + "[" * 3000 + "\n", r"line 2 is not JSON", {"not JSON": 1}),
    "wrong column": Broken("a.jsonl", '{"txt": "a"}\n', r"row 1: .*'text' is unknown\. Did you mean 'txt'.*Known: txt"),
    "column missing later": Broken(
        "a.jsonl", GOOD + '{"txt": "b"}\n', r"row 2 has no 'text' \(it has 'txt'\)\. Take", {"without 'text'": 1}
    ),
    "null text": Broken("a.jsonl", GOOD + '{"text": null}\n', r"row 2 has no 'text'\. Take", {"without 'text'": 1}),
    "number": Broken("a.jsonl", GOOD + '{"text": 5}\n' * 2, r"row 2 is a number, found 5", {"'text' is no text": 2}),
    "no object": Broken("a.jsonl", GOOD + "[1, 2]\n", r"row 2 is a list; a row is an object", {"no object": 1}),
    "lines that are lists": Broken("a.jsonl", '["a"]\n["b"]\n', r"row 1 is a list; a row is an object", {}),
    "empty answers": Broken(
        "a.jsonl", pairs("5", " ", ""), r"row 2 has an empty answer, so nothing to train on", {"empty answer": 2}
    ),
    "no role": Broken(
        "a.jsonl", chats({"messages": [{"content": "5"}]}), r"row 2, message 1 has no role \(it has 'content'\)",
        {"without a role": 1},
    ),
    "unknown role": Broken(
        "a.jsonl", chats({"messages": [{"role": "asistant", "content": "5"}]}),
        r"row 2, message 1 has the role 'asistant'\. Did you mean 'assistant'", {"unknown role": 1},
    ),
    "no answer": Broken(
        "a.jsonl", chats({"messages": CHAT["messages"][:1]}), r"row 2 has no message of the assistant",
        {"without an answer": 1},
    ),
    "null instruction": Broken(
        "a.jsonl", instructions(instruction=None), r"alpaca: .*row 2 has no 'instruction'\. Take",
        {"without 'instruction'": 1},
    ),
    "number as an instruction": Broken(
        "a.jsonl", instructions(instruction=5), r"row 2 is a number, found 5; a text", {"'instruction' is no text": 1}
    ),
    "number as an input": Broken(
        "a.jsonl", instructions(input=5), r"alpaca 'input': .*row 2 is a number, found 5", {"'input' is no text": 1}
    ),
    "list as a system message": Broken(
        "a.jsonl", instructions(system=["Be brief."]), r"'system': .*row 2 is a list", {"'system' is no text": 1}
    ),
    "not utf-8": Broken(
        "a.jsonl", GOOD.encode() + '{"text": "é"}\n'.encode("latin-1"),
        r"row 2 is not utf-8 \(byte 0xe9.*encoding: latin", {"not utf-8": 1},
    ),
    "not utf-8, csv": Broken(
        "a.csv", b"text\na\n\xe9\n", r"row 2 is not utf-8 \(byte 0xe9.*encoding: latin", {"not utf-8": 1}
    ),
    "utf-16": Broken(
        "a.jsonl", GOOD.encode("utf-16"), r"is not utf-8 .*as utf-16 does\)\. Set data.args: {encoding: utf-16}"
    ),
    "huge row": Broken(
        "a.jsonl", GOOD + '{"text": "' + "b" * 5000 + '"}\n' + GOOD, r"row 2 has more than 4,000 characters\. Cut it",
        {"too long to be a row": 1},
    ),
    "huge cell": Broken("a.csv", f"text\na\n{'b' * 5000}\nc\n", r"row 2 \(line 3\): field larger than", {"not csv": 1}),
    "uneven columns": Broken(
        "a.csv", "text,n\na,1\nb\nc,2,3\n", r"row 2 \(line 3\) has 1 fields and the header 2\. Quote",
        {"other fields than the header": 2},
    ),
    "open quote": Broken(
        "a.csv", 'text,n\na,1\n"b,2\nc,3\n', r"row 2 \(lines 3 to 4; is a quote left open\?\)",
        {"other fields than the header": 1},
    ),
    "duplicate columns": Broken("a.csv", "text,text\na,b\n", r"a\.csv: the column 'text' is there twice\. Rename"),
    "truncated parquet": Broken("a.parquet", truncated_parquet, r"cannot read .*It is cut off, or no parquet file"),
    "cut arrow": Broken("a.arrow", cut_arrow, r"cannot read .*It is cut off, or no arrow file: copy"),
    "empty file": Broken("a.jsonl", "", r"a\.jsonl has no text: it is empty\. Name another file"),
    "nothing readable": Broken("a.jsonl", "{\n" * 3, r"a\.jsonl is not JSON"),
    "no label": Broken("a.jsonl", GOOD + '{"text": "b"}\n', r"row 2 has no label", {"without a label": 1}, True),
    "mixed labels": Broken(
        "a.jsonl", GOOD + '{"text": "b", "label": 1}\n',
        r"has a number, 1, in .*row 2, and a word, 'x', in .*row 1\. Write the labels alike", labelled=True,
    ),
}  # fmt: skip


def corpus(path: Path, cache: Path, policy: str, labelled: bool) -> Corpus:
    recipe = load_recipe("quickstart", [f"data.source={path}", f"data.bad_rows={policy}"])
    return load_corpus(recipe.data, str(path), {}, cache=cache, labelled=labelled)


@pytest.mark.parametrize("case", FILES)
def test_each_says_where_and_what_to_do_or_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    broken, path = FILES[case], tmp_path / FILES[case].name
    monkeypatch.setattr(rows, "LONGEST", 4000)
    if callable(broken.content):
        broken.content(path)
    else:
        path.write_bytes(broken.content if isinstance(broken.content, bytes) else broken.content.encode())

    def refused(policy: str) -> str:
        with pytest.raises(TaskError, match=broken.said) as caught:
            corpus(path, tmp_path / "cache", policy, broken.labelled)
        said = str(caught.value)
        assert "\n" not in said and broken.name in said
        return said

    assert refused("refuse").endswith("data.bad_rows: skip.") == (broken.counted is not None)
    if not broken.counted:
        refused("skip")
        return
    left = corpus(path, tmp_path / "cache", "skip", broken.labelled)
    assert left.bad == broken.counted and len(left.texts) >= 1
    refused("refuse")  # what is kept by now was read with leave


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"\xef\xbb\xbf" + GOOD.encode(), ["a"]),
        ((GOOD + '{"text": "b"}\n').replace("\n", "\r\n").encode(), ["a", "b"]),
        (b'[{"text": "a"}]\n', ["a"]),
    ],
    ids=["BOM", "CRLF", "a list"],
)
def test_what_only_looks_broken_is_read(tmp_path: Path, content: bytes, texts: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert list(corpus(path, tmp_path / "cache", "refuse", labelled=False).texts) == texts


def test_a_folder_without_a_readable_file_says_what_would_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.docx").write_text("x")
    with pytest.raises(TaskError, match=r"no file in the folder .*folder' ends in one of \.txt"):
        corpus(tmp_path / "folder", tmp_path / "cache", "skip", labelled=False)


def test_labels_that_only_validation_has_are_named_with_their_row(tmp_path: Path) -> None:
    for name, labels in (("train", "xy"), ("held", "xz")):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": "t", "label": each}) + "\n" for each in labels)
        )
    changes = [f"data.source={tmp_path}/train.jsonl", f"data.validation={tmp_path}/held.jsonl", "goal=null"]
    with pytest.raises(TaskError, match=r"classes that training data lacks: \['z'\] \('z' in .*held\.jsonl, row 2\)"):
        prepare(load_recipe("finetune-minilm", changes), tmp_path / "cache")


def test_what_is_skipped_stands_in_the_receipt_and_in_the_report(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {n} of many"}) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": ', "{]", '{"text": 5}']))
    changes = [
        f"data.source={tmp_path}/a.jsonl", "data.bad_rows=skip", "data.validation=0", "data.sequence_length=32",
        "data.batch_size=4", "data.micro_batch_size=auto", "model.tokenizer={train: bpe, vocab_size: 300}",
        "model.config={model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 2}", "budget={steps: 1}", "strategy.name=single",
        "tracking.ledger=false", "evaluation={at_end: false}", "export=null", "goal=null",
    ]  # fmt: skip
    recipe, bad = load_recipe("quickstart", changes), {"not JSON": 2, "'text' is no text": 1}
    report = fit(plan(recipe), run_dir=tmp_path / "run")
    assert report is not None and report.as_dict()["left_out"] == {"rows_bad": bad}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["left_out"] == {"rows_bad": bad}
    assert receipt_of(recipe, tmp_path / "run").bad_rows == bad
