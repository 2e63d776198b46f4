"""Validation on several ranks counts every sample once, with the buffers and weights that are kept."""

from __future__ import annotations

import json
from collections import Counter, deque

import evaluating_ranks
import numpy as np
import pytest
import torch
from evaluating_ranks import Convolving, images
from hypothesis import given
from hypothesis import strategies as st
from processes import succeed
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler

from shoestring.callbacks.sampling.evaluation import EvenBatches
from shoestring.callbacks.sampling.undone import undone
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.checkpoint.weights import load_weights

pytestmark = pytest.mark.filterwarnings("ignore")
COUNTED = {
    "own batches": list(range(7)), "one a batch": list(range(5)), "shuffled": list(range(7)),
    "fewer than ranks": [0, 1], "streams": [0, 10, 11, 20, 21, 22],
}  # fmt: skip
COUNTED["sized streams"] = COUNTED["streams"]


def even(size: int, micro: int, world: int, base=None) -> list[EvenBatches]:
    return [EvenBatches(base or SequentialSampler(range(size)), micro=micro, rank=r, world=world) for r in range(world)]


@given(size=st.integers(0, 60), micro=st.integers(1, 7), world=st.integers(1, 5))
def test_every_sample_is_counted_once_and_all_ranks_have_as_many_batches(size, micro, world):
    ranks = even(size, micro, world)
    batches = [list(rank) for rank in ranks]
    assert {len(rank) for rank in batches} == {len(ranks[0])}
    assert all(1 <= len(batch) <= micro for rank in batches for batch in rank)
    counted = [b for rank, mine in zip(ranks, batches, strict=True) for i, b in enumerate(mine) if not rank.repeats(i)]
    assert Counter(i for batch in counted for i in batch) == Counter(range(size))


@given(sizes=st.lists(st.integers(1, 4), max_size=12), world=st.integers(1, 5))
def test_batches_of_the_users_own_stay_whole(sizes, world):
    units = [[f"{n}-{i}" for i in range(size)] for n, size in enumerate(sizes)]
    ranks = even(0, 1, world, base=units)
    counted = [batch for rank in ranks for i, batch in enumerate(rank) if not rank.repeats(i)]
    assert sorted(counted) == sorted(units)


def test_ranks_share_out_the_same_random_order():
    torch.manual_seed(1)
    first = list(even(20, 3, 2, base=RandomSampler(range(20)))[0])
    torch.manual_seed(2)
    second = list(even(20, 3, 2, base=RandomSampler(range(20)))[1])
    assert sorted(i for batch in (*first, *second) for i in batch) == list(range(20))


def test_what_a_step_has_added_is_taken_back():
    class Meter:
        def __init__(self):
            self.total = np.zeros(2)

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.sums, self.rows, self.names, self.last = torch.zeros(2), [[1]], {"a": {1}}, deque([1])
            self.meter, self.child = Meter(), nn.Linear(1, 1)

        def step(self):
            self.seen += 1
            self.sums += 1
            self.rows[0].append(2)
            self.rows.append([3])
            self.names["a"].add(2)
            self.names["b"] = 1
            self.last.append(2)
            self.meter.total += 1
            self.child.count = self.count = 1

    module = Module()
    sums, inner = module.sums, module.rows[0]
    with pytest.raises(ZeroDivisionError), undone(module, {}):
        module.step()
        assert module.seen == 1 and module.rows == [[1, 2], [3]] and module.meter.total[0] == 1
        1 / 0  # noqa: B018
    assert module.seen == 0 and module.sums is sums and sums.tolist() == [0, 0]
    assert module.rows == [[1]] and module.rows[0] is inner
    assert module.names == {"a": {1}} and module.last == deque([1]) and module.meter.total.tolist() == [0, 0]
    assert not hasattr(module, "count") and not hasattr(module.child, "count")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights that training on one device in torch's own layout gives."""
    home = tmp_path_factory.mktemp("plain")
    trainer = Trainer(Budget(steps=2), run_dir=home, ledger=False, accelerator="cpu")
    trainer.fit(Convolving(last=False), images(12))
    return load_weights(home / "final")


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 3), ("zero3", 3), ("zero1", 2), ("zero2", 2)])
def test_ranks_tell_the_exact_means_of_the_model_that_is_kept(strategy, world, plain, tmp_path):
    """Sums, lists and logged means of every kind of loader; batch norms, a parameter of one element, channels_last."""
    succeed(evaluating_ranks.main, strategy, tmp_path, world == 3, world=world, folder=tmp_path, timeout=200)
    last = load_weights(tmp_path / "last" / "final")
    assert all(torch.allclose(last[name], weight, atol=1e-5) for name, weight in plain.items())
    for name, wanted in COUNTED.items() if world == 3 else ():
        row = json.loads((tmp_path / "seen.json").read_text())[name]
        assert row["values"] == wanted, name
        assert row["sums"][::2] == [sum(wanted), len(wanted)], name
        assert row["mean"] == pytest.approx(sum(wanted) / len(wanted)), name
        assert row["sums"][1] == pytest.approx(row["of the kept model"], rel=1e-4), name


def test_a_stream_without_a_batch_on_one_rank_is_refused_on_all(tmp_path):
    succeed(evaluating_ranks.no_batch, tmp_path, world=2, folder=tmp_path, timeout=100)
    said = {(tmp_path / f"said-{rank}").read_text() for rank in range(2)}
    assert len(said) == 1 and "NoSamples: validation: the stream has no batch on 1 of 2 ranks" in said.pop()
