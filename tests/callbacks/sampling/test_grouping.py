"""Samples of alike lengths share a batch: less padding, and still an order that the seed alone decides."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, SequentialSampler

from shoestring.callbacks.sampling.evaluation import EvenBatches
from shoestring.callbacks.sampling.global_batches import GlobalBatches
from shoestring.callbacks.sampling.grouping import group_by_length

SIZES = st.integers(0, 300)


def lengths_of(size: int) -> np.ndarray:
    return np.random.default_rng(size).geometric(0.05, size)


def padding(batches: list[list[int]], lengths: np.ndarray) -> int:
    return sum(int(lengths[batch].max()) * len(batch) - int(lengths[batch].sum()) for batch in batches)


@given(size=SIZES, batch=st.integers(1, 9), seed=st.integers(0, 5))
def test_grouping_moves_samples_and_loses_none(size, batch, seed):
    order = np.random.default_rng(seed).permutation(size).tolist()
    lengths, whole = lengths_of(size), size // batch * batch
    grouped = group_by_length(order, lengths, batch, seed)
    assert sorted(grouped) == list(range(size)) and grouped[whole:] == order[whole:]
    assert grouped == group_by_length(order, lengths, batch, seed)
    if whole:
        assert lengths[grouped[:batch]].max() == lengths[grouped[:whole]].max(), "the longest comes first"


def sampler(size: int, micro: int, accumulate: int, world: int, rank: int, at: int = 0) -> GlobalBatches:
    made = GlobalBatches(
        RandomSampler(range(size)), micro=micro, accumulate=accumulate, rank=rank, world=world, seed=3,
        position=lambda: at,
    )  # fmt: skip
    made.lengths, made.grouped = lengths_of(size), True
    return made


@pytest.mark.parametrize("cut", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_global_batches_are_the_same_however_they_are_cut_and_resume_anywhere(cut):
    size, (micro, accumulate, world) = 203, cut
    ranks = [list(sampler(size, micro, accumulate, world, rank)) for rank in range(world)]
    steps = [
        Counter(i for rank in ranks for part in rank[s : s + accumulate] for i in part)
        for s in range(0, len(ranks[0]), accumulate)
    ]
    assert steps == [Counter(batch) for batch in sampler(size, 8, 1, 1, 0)]
    epoch = len(ranks[0]) // accumulate
    assert list(sampler(size, micro, accumulate, world, world - 1, at=5)) == ranks[-1][5 * accumulate :]
    assert list(sampler(size, micro, accumulate, world, 0, at=epoch)) != ranks[0], "every epoch has other batches"


def test_most_padding_is_gone():
    size, lengths = 2000, lengths_of(2000)
    plain = sampler(size, 8, 1, 1, 0)
    plain.grouped = False
    grouped = padding(list(sampler(size, 8, 1, 1, 0)), lengths)
    assert grouped < 0.1 * padding(list(plain), lengths)
    # the micro-batches of a step take neighbours
    assert padding(list(sampler(size, 2, 4, 1, 0)), lengths) < grouped


def test_a_technique_that_selects_samples_decides():
    one = sampler(64, 8, 1, 1, 0)
    one.select = lambda epoch, step, run_step, chosen: list(range(8))
    assert all(sorted(batch) == list(range(8)) for batch in one)
    assert lengths_of(64)[next(iter(one))].tolist() == sorted(lengths_of(64)[:8].tolist(), reverse=True)


@given(size=SIZES, micro=st.integers(1, 7), world=st.integers(1, 4))
def test_evaluation_reads_every_sample_once_in_alike_batches(size, micro, world):
    lengths = lengths_of(size)
    ranks = [
        list(EvenBatches(SequentialSampler(range(size)), micro=micro, rank=rank, world=world, lengths=lengths))
        for rank in range(world)
    ]
    seen = Counter(i for rank in ranks for batch in rank for i in batch)
    assert set(seen) == set(range(size)) and len({len(rank) for rank in ranks}) == 1
    if size >= len(ranks[0]) * world:
        assert set(seen.values()) <= {1}
    plain = [batch for rank in range(world) for batch in EvenBatches(range(size), micro=micro, rank=rank, world=world)]
    grouped = [batch for rank in ranks for batch in rank]
    assert sum(padding([b], lengths) for b in grouped if b) <= sum(padding([b], lengths) for b in plain if b)
