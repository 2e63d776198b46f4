"""Samples of whole chats: every document once, none cut, kept apart, and only answers are targets."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_built import built

from shoestring.trainer.data.chats import Answers
from shoestring.trainer.data.corpora import of_texts
from shoestring.trainer.data.packing import Packed, best_fit
from shoestring.trainer.data.token_store import IGNORED, store_answers
from shoestring.trainer.data.tokens import Documents


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 30))
def test_items_are_grouped_tightly(lengths, room):
    groups = best_fit(np.array(lengths, dtype=np.int64), room)
    assert sorted(np.concatenate([[], *groups]).tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in group) for group in groups]
    assert all(size <= room for size in filled)
    assert sum(size <= room // 2 for size in filled) <= 1, "two of them would have shared one"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    said = ["hello " * n for n in range(1, 30)]
    chats = [
        [{"role": "user", "content": "good " * (40 - n)}, {"role": "assistant", "content": text}]
        for n, text in enumerate(said)
    ]
    rows = [json.dumps({"messages": chat}) for chat in chats]
    answers = Answers(built("byte_level"))
    return store_answers(of_texts(rows), answers, key="", vocabulary=400, cache=tmp_path_factory.mktemp("cache"))


def test_each_document_is_in_one_sample_whole(store):
    packed = Packed(store, 200)
    assert packed.without_target == packed.cut == 0 and len(packed) < len(store.offsets) - 1
    seen = []
    for sample in packed:
        starts = (sample["position_ids"] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], 200], strict=True):
            ids, labels = sample["input_ids"][start:end], sample["labels"][start:end]
            assert torch.equal(sample["position_ids"][start:end], torch.arange(end - start))
            assert labels[0] == IGNORED
            if (labels != IGNORED).any():
                seen.append((tuple(ids.tolist()), tuple(labels.tolist())))
            else:
                assert not ids.any(), "the rest is padding"
    wanted = [(tuple(store.document(i)), tuple(store.labels(i).tolist())) for i in range(len(store.offsets) - 1)]
    assert sorted(seen) == sorted(wanted)
    counts = [int((sample["labels"] != IGNORED).sum()) for sample in packed]
    assert packed.target_counts.tolist() == counts
    assert packed.token_counts.sum() == store.meta["tokens"]
    assert sorted(np.concatenate([packed.targets(i) for i in range(len(packed))])) == sorted(
        store.tokens[:][store.trained[:]]
    )


@pytest.mark.parametrize("kind", [Packed, Documents])
def test_what_no_answer_is_left_of_is_left_out_and_counted(store, kind):
    short = kind(store, 40)
    lost = sum(not (store.labels(i, 40)[1:] != IGNORED).any() for i in range(len(store.offsets) - 1))
    assert 0 < lost == short.without_target
    assert all((sample["labels"][1:] != IGNORED).any() for sample in short)
    assert short.target_counts.min() > 0
