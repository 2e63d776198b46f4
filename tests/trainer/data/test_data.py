"""Data: sources, splits, the cache that processes race for."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoestring.trainer.data.baselines import target_counts, unigram
from shoestring.trainer.data.cache import build_once
from shoestring.trainer.data.corpora import of_texts, python_packages, python_stdlib
from shoestring.trainer.data.rows import pieces
from shoestring.trainer.data.split import balance, split
from shoestring.trainer.data.tokens import Blocks


def test_unigram_baseline_by_hand(tiny: Any) -> None:
    # training counts (a 2, b 1, c 0) plus one each: 3/6, 2/6, 1/6
    expected = -(2 * math.log(3 / 6) + 1 * math.log(1 / 6)) / 3
    assert unigram(np.array([2, 1, 0]), np.array([2, 0, 1])) == pytest.approx(expected)
    counts = target_counts(Blocks(tiny.bytes(["aab", "ca"]), 4, keep_tail=True), 128)
    # stream 0aab 0ca: the first token of each block is not a target
    assert {chr(i): int(n) for i, n in enumerate(counts) if n} == {"a": 3, "b": 1, "c": 1}


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "text"])
def test_local_formats(tiny: Any, tmp_path: Path, kind: str) -> None:
    import pandas

    texts = [f"line {i}, of text {i * i}" for i in range(40)]
    table = pandas.DataFrame({"body": texts})
    path = tmp_path / f"data.{'txt' if kind == 'text' else kind}"
    if kind == "json":
        table.to_json(path, orient="records", lines=True)
    elif kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        path.write_text("\n".join(texts))
    column = "text" if kind == "text" else "body"
    data = {"source": str(path), "text_column": column, "limit": None, "pack": False, "sequence_length": 128}
    task = tiny.task(data={**data, "validation": 0.0})
    assert len(task.train) == (1 if kind == "text" else 40)
    # 0 + 4 is the first row's tail: the tokenizer gives back the very text
    assert task.tokenizer.decode(task.train[0]["input_ids"][:-1]).startswith(texts[0])


def test_the_cache_follows_content_not_time_stamps(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first words " * 50)
    data = {"source": str(path), "limit": None, "validation": 0.0, "sequence_length": 16}
    stamp = path.stat()
    first = tiny.task(data=data).train[0]["input_ids"]
    path.write_text("other words " * 50)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    task = tiny.task(data=data)
    assert "other words" in task.tokenizer.decode(task.train[0]["input_ids"])
    path.write_text("first words " * 50)
    assert torch.equal(tiny.task(data=data).train[0]["input_ids"], first)


RACER = """
import sys, time
from pathlib import Path
from shoestring.trainer.data.cache import build_once
def build(folder):
    (folder / "half").write_text("x")
    Path(sys.argv[2]).open("a").write("built\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "whole").write_text("y")
assert "torch" not in sys.modules
print(sorted(p.name for p in build_once(Path(sys.argv[1]), build).iterdir()))
"""


def racer(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", RACER, *map(str, args)], stdout=subprocess.PIPE, text=True)


def test_racing_processes_build_once_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    target, log = tmp_path / "cache" / "thing", tmp_path / "log"
    victim = racer(target, log, 60)
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    victim.stdout.close()
    assert not target.exists()
    racers = [racer(target, log, 0.5) for _ in range(2)]
    assert [process.communicate(timeout=30)[0] for process in racers] == ["['half', 'whole']\n"] * 2
    assert log.read_text().count("built") == 2, "the victim, and then exactly one of the two"

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "cache" / "other", fails)
    assert [p.name for p in (tmp_path / "cache").iterdir() if "other" in p.name] == ["other.lock"]

    def overtaken(folder: Path) -> None:
        (tmp_path / "cache" / "late").mkdir()
        (tmp_path / "cache" / "late" / "theirs").touch()
        (folder / "ours").touch()

    assert [p.name for p in build_once(tmp_path / "cache" / "late", overtaken).iterdir()] == ["theirs"]


def test_the_split_is_by_file_and_the_same_every_time() -> None:
    corpus = python_stdlib(limit=60)
    train, held = split(corpus, 0.1)
    again = split(python_stdlib(limit=60), 0.1)
    assert (list(train.groups), list(held.groups)) == (list(again[0].groups), list(again[1].groups))
    assert len(held.texts) == 6 and len(train.texts) == 54 and not set(train.groups) & set(held.groups)
    assert list(held.groups) != list(corpus.groups[:6]), "the first files are not a sample"
    assert train.fingerprint == again[0].fingerprint != held.fingerprint
    # a hash decides, not the place: taking other files away moves nobody across, up to the share
    fewer = corpus.take([i for i in range(60) if corpus.groups[i] not in set(train.groups[:20])])
    assert set(split(fewer, 0.1)[1].groups) <= set(held.groups)


def test_package_chunks_are_balanced_and_no_file_is_on_both_sides() -> None:
    corpus = python_packages()
    assert len(set(corpus.labels)) == 10
    for part in (train := balance(split(corpus, 0.2)[0]), held := balance(split(corpus, 0.2)[1])):
        assert len({part.labels.count(label) for label in set(corpus.labels)}) == 1
    assert len(held.texts) > 100 and not set(train.groups) & set(held.groups)
    assert all(path.startswith(f"{label}/") for path, label in zip(held.groups, held.labels, strict=True))


def test_equal_texts_stay_on_one_side() -> None:
    corpus = of_texts(["same", "b", "same", "c", "d", "same"])
    train, held = split(corpus, 0.3)
    assert not set(train.texts) & set(held.texts) and len(train.texts) + len(held.texts) == 6


def test_long_texts_are_cut_after_lines() -> None:
    text = "".join(f"line {i}\n" for i in range(1000)) + "x" * 300
    parts = list(pieces(io.StringIO(text), 100))
    assert "".join(parts) == text and max(map(len, parts)) <= 100
    assert all(part.endswith("\n") for part in parts[:80])
