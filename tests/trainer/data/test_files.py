"""Files as people have them are read as they are meant; what cannot be trained on is named with file and row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from shoestring.recipes import recipe_from
from shoestring.trainer.data import sources
from shoestring.trainer.data.corpora import BATCH, Corpus, in_batches, of_texts
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.paths import find_files
from shoestring.trainer.data.token_store import store_tokens


def corpus(tmp_path: Path, source: str | Path, *, labelled: bool = False, **data: Any) -> Corpus:
    """What `load_corpus` makes of a source."""
    recipe = recipe_from(
        {
            "model": {"task": "causal-lm", "config": {"model_type": "llama"}, "tokenizer": "gpt2"},
            "data": {"source": str(source), **data},
            "budget": {"steps": 1},
        }
    )
    args = dict(recipe.data.args)
    return sources.load_corpus(recipe.data, str(source), args, cache=tmp_path / "cache", labelled=labelled)


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_nothing_is_guessed_from_the_words_of_a_csv(tmp_path: Path) -> None:
    rows = [("null", "None"), ("NA", "nan"), ("007", "None"), ("3.50", "1e3"), ("TRUE", "nan"), ('a, "b"\nc', "1e3")]
    with open(tmp_path / "rows.CSV", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    read = corpus(tmp_path, tmp_path / "rows.CSV", labelled=True)
    assert list(zip(read.texts, read.labels, strict=True)) == rows


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl", '{"text": "ü"}\n\n{"text": "b", "n": 1}\n{"n": 2, "text": "c"}\n', ["ü", "b", "c"]),
        ("a.json", json.dumps([{"text": "a"}, {"text": "b"}], indent=1), ["a", "b"]),
        ("one.json", json.dumps({"text": "a"}, indent=1), ["a"]),
        ("a.tsv", 'text\tn\nhel"lo\t1\nno\t2\n', ['hel"lo', "no"]),
        ("a.txt", "\ufeffone\r\ntwo\r\n", ["one\ntwo\n"]),
        ("bom.jsonl", '\ufeff{"text": "a"}\n', ["a"]),
        ("surrogate.jsonl", '{"text": "a\\ud800b"}\n', ["a\ufffdb"]),
    ],
)
def test_files_are_read_as_they_are_meant(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    assert list(corpus(tmp_path, written(tmp_path / name, content)).texts) == texts


def test_arguments_of_the_reader(tmp_path: Path) -> None:
    rows = written(tmp_path / "a.csv", "text;n\nä;1\n".encode("latin-1"))
    assert list(corpus(tmp_path, rows, args={"sep": ";", "encoding": "latin-1"}).texts) == ["ä"]
    nested = written(tmp_path / "a.json", json.dumps({"data": [{"text": "a"}]}))
    assert list(corpus(tmp_path, nested, args={"field": "data"}).texts) == ["a"]
    lines = written(tmp_path / "a.txt", "one\ntwo\n\n\nthree\n")
    assert list(corpus(tmp_path, lines, args={"sample_by": "paragraph"}).texts) == ["one\ntwo", "three"]
    assert list(corpus(tmp_path, lines, args={"sample_by": "line"}).texts) == ["one", "two", "three"]
    with pytest.raises(TaskError, match=r"'sepp' is unknown\. Did you mean 'sep'"):
        corpus(tmp_path, rows, args={"sepp": ";"})


def test_what_exists_under_the_very_name_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data [2024]"
    for name in ("NOTES.TXT", "my notes [v1].txt", "__draft__::x.md", ".hidden.txt", "deep/b.Txt"):
        written(folder / name, name)
    written(folder / "picture.png", b"\x89PNG")
    assert len(set(corpus(tmp_path, folder).texts)) == 5
    assert list(corpus(tmp_path, folder / "my notes [v1].txt").texts) == ["my notes [v1].txt"]
    assert [file.name for file in find_files(f"{tmp_path}/data ?2024?/*.txt")] == ["my notes [v1].txt"]
    assert find_files("squad") == find_files("owner/name") == []


def test_a_folder_of_several_formats_says_so_and_can_be_told_which(tmp_path: Path) -> None:
    written(tmp_path / "f" / "a.txt", "a")
    written(tmp_path / "f" / "b.txt", "b")
    written(tmp_path / "f" / "rows.jsonl", '{"text": "c"}')
    with pytest.raises(TaskError, match=r"found 2 text \(a\.txt, …\), 1 json \(rows\.jsonl\)"):
        corpus(tmp_path, tmp_path / "f")
    assert list(corpus(tmp_path, tmp_path / "f", format="text").texts) == ["a", "b"]
    assert list(corpus(tmp_path, tmp_path / "f", format="json").texts) == ["c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"other": 1}\n', r"a\.jsonl, row 2 has no 'text' \(it has 'other'\)"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', r"a\.jsonl, row 2 has no 'text'\. Take"),
        ("a.jsonl", '{"text": 5}\n', r"a\.jsonl, row 1 is a number, found 5"),
        ("a.jsonl", '{"text": [{"role": "user", "content": "a"}]}\n', r"row 1 is a list of messages"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", '"a"\n', r"a\.jsonl, row 1 is a str; a row is an object"),
        ("a.jsonl", "", r"a\.jsonl has no text"),
        ("a.jsonl", '{"text": " "}\n{"text": ""}\n', r"all 2 rows are empty"),
        ("a.json", '{"data": [{"text": "a"}]}', r"'text' is unknown.*data\.args: \{field: data\}"),
        ("a.csv", "text;n\na;1\n", r'separated by \';\': set data\.args: \{sep: ";"\}'),
        ("a.csv", "text,n\na,1\nb\n", r"a\.csv, row 2 \(line 3\) has 1 fields and the header 2"),
        ("a.txt", "é".encode("latin-1"), r"a\.txt, row 1 is not utf-8 \(byte 0xe9.*encoding: latin-1"),
        ("a.txt", "hello".encode("utf-16"), r"a\.txt is not utf-8 \(byte 0xff"),
        ("a.parquet", b"no such thing", r"cannot read .*a\.parquet"),
        ("a.txt", "", r"a\.txt has no text"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = written(tmp_path / name, content)
    for _ in range(2):  # a failure is not kept
        with pytest.raises(TaskError, match=message):
            corpus(tmp_path, path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["x"], ["y"]], r"rows\.jsonl, row 1 is a list, found \['x'\]; a class is"),
        (["x", None], r"rows\.jsonl, row 2 has no label"),
        ([n / 7 for n in range(1, 60)] * 4, r"has 59 different numbers, such as 0\.14.* in .*row 1; .*regression"),
        ([f"name {n}" for n in range(60)], r"60 different labels in 60 rows, such as 'name 0' in .*rows\.jsonl, row 1"),
    ],
    ids=["list", "none", "regression", "names"],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: list[Any], message: str) -> None:
    lines = [json.dumps({"text": "t", "label": label}) for label in labels]
    path = written(tmp_path / "rows.jsonl", "\n".join(lines))
    with pytest.raises(TaskError, match=message):
        corpus(tmp_path, path, labelled=True)


def test_one_class_however_its_number_is_written(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "t", "label": label}) for label in (1, 1.0, "1", 0, True, 2.5)]
    read = corpus(tmp_path, written(tmp_path / "rows.jsonl", "\n".join(lines)), labelled=True)
    assert read.labels == ["1", "1", "1", "0", "True", "2.5"]


def test_rows_without_text_and_rows_cut_are_counted(tiny: Any, tmp_path: Path) -> None:
    texts = ["", "one two three", "  ", "four", *["five six seven eight nine ten " * 9] * 3]
    lines = "\n".join(json.dumps({"text": text, "label": "ab"[n % 2]}) for n, text in enumerate(texts))
    path = written(tmp_path / "rows.jsonl", lines)
    data = {"source": str(path), "limit": None, "validation": 0, "pack": False, "sequence_length": 32}
    facts = tiny.task(data=data).facts
    assert (facts["rows_without_text"], facts["rows_cut"], facts["train_samples"]) == (2, 3, 5)
    model = {"task": "sequence-classification", "config": {**tiny.llama, "model_type": "bert"}}
    for _ in range(2):  # the second time, the tokens are found
        facts = tiny.task(model=model, data=data).facts
        assert (facts["rows_without_text"], facts["rows_cut"], facts["train_samples"]) == (2, 3, 5)
    assert not {"rows_cut", "rows_without_text"} & set(tiny.task().facts)


def test_texts_are_tokenized_a_million_characters_at_a_time(tmp_path: Path) -> None:
    texts = ["ab\n" * 700_000, *["x" * 3000] * 900, "", "z" * 5_000_000, "end"]
    most = max(sum(map(len, batch)) for batch in in_batches(texts[1:901]))
    assert most <= BATCH + 3000 and [t for b in in_batches(texts) for t in b] == texts
    characters: list[int] = []

    def encode(parts: list[str]) -> list[list[int]]:
        characters.append(sum(map(len, parts)))
        return [list(part.encode()) for part in parts]

    frame = ([1], [2, 3])
    store = store_tokens(of_texts(texts), encode, key="a", vocabulary=256, cache=tmp_path, frame=frame)
    assert max(characters) <= BATCH + (1 << 16) and len(store.offsets) == len(texts) + 1
    for number in (0, 5, 901, 902, 903):
        assert store.document(number).tobytes() == bytes_of([1, *texts[number].encode(), 2, 3])


def bytes_of(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(2, "little") for token in tokens)
