"""Large sets: read in constant memory, and not read again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shoestring.recipes import load_recipe
from shoestring.trainer.data import mapped
from shoestring.trainer.data.corpora import in_batches, of_texts
from shoestring.trainer.data.mapped import MappedNumbers
from shoestring.trainer.data.prepare import prepare
from shoestring.trainer.data.sources import load_corpus
from shoestring.trainer.data.split import split
from shoestring.trainer.data.token_store import TokenStore, store_tokens

ROWS = 40_000
MIB = 1 << 20


def status(name: str) -> int:
    """Bytes that the system counts for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of about 40 MB in rows of about 1,000 characters."""
    path = tmp_path_factory.mktemp("large") / "rows.jsonl"
    with open(path, "w") as file:
        for n in range(ROWS):
            file.write(json.dumps({"text": f"{n} " * (990 // (len(str(n)) + 1))}) + "\n")
    return path


def test_a_file_is_checked_split_and_tokenized_in_little_memory(large: Path, tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [f"data.source={large}", "data.limit=null"])

    def encode(texts: list[str]) -> list[list[int]]:
        return [[int(text.split(" ", 1)[0]) % 50_000] * (len(text) // 8) for text in texts]

    def tokenized(cache: Path) -> TokenStore:
        corpus = load_corpus(recipe.data, str(large), {}, cache=cache, labelled=False)
        train, held = split(corpus, 0.05, cache)
        assert len(held.texts) == ROWS // 20 and len(train.texts) == ROWS - ROWS // 20
        return store_tokens(train, encode, key="", vocabulary=50_000, cache=cache)

    tokenized(tmp_path / "warm")  # what libraries take once is theirs
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    store = tokenized(tmp_path / "cache")
    grown = status("VmHWM") - before
    assert large.stat().st_size > 38 * MIB and grown < 16 * MIB, f"{grown / MIB:.1f} MiB"
    assert len(store.offsets) == ROWS - ROWS // 20 + 1 and len(store.tokens) > 4_000_000


def test_a_map_lets_go_of_what_has_been_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.arange(8 * MIB, dtype=np.uint32)
    numbers.tofile(tmp_path / "numbers.bin")
    monkeypatch.setattr(mapped, "HELD", 2 * MIB)
    kept = MappedNumbers(tmp_path / "numbers.bin", "uint32")
    before, most = status("RssFile"), 0
    for start in range(0, len(kept), 1 << 16):
        assert kept[start : start + 2].tolist() == [start, start + 1]
        assert np.array_equal(kept[start : start + (1 << 16)], numbers[start : start + (1 << 16)])
        most = max(most, status("RssFile") - before)
    assert most < 6 * MIB < numbers.nbytes


def test_a_second_start_reads_no_text(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_HOME")
    small = tmp_path / "rows.jsonl"
    small.write_text("".join(large.read_text().splitlines(keepends=True)[:2000]))
    monkeypatch.setattr("shoestring.trainer.data.cache.SETTLED_SECONDS", 0.0)
    changes = [f"data.source={small}", "data.limit=null", "model.tokenizer={train: bpe, vocab_size: 300}"]
    recipe = load_recipe("quickstart", changes)
    first = prepare(recipe, tmp_path / "cache")
    before = bytes_read()
    second = prepare(recipe, tmp_path / "cache")
    assert bytes_read() - before < MIB / 4 < small.stat().st_size / 4
    assert second.facts == first.facts
    with small.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert prepare(recipe, tmp_path / "cache").facts["data_digest"] != first.facts["data_digest"]


def test_answers_are_counted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.trainer.data import token_store

    random = np.random.default_rng(0)
    lengths = random.integers(0, 40, 200)
    marks = random.random(int(lengths.sum())) < 0.4
    folder = tmp_path / "store"
    folder.mkdir()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.save(folder / "offsets.npy", offsets)
    marks.tofile(folder / "trained.bin")
    monkeypatch.setattr(token_store, "COUNTED", 100)
    expected = [marks[a + 1 : min(b, a + 16)].sum() for a, b in pairwise(offsets)]
    for _ in range(2):
        assert TokenStore(folder).target_counts(16).tolist() == expected
    assert list(in_batches(of_texts(["a"]).texts)) == [["a"]]
