"""The largest scores, found by counting, are those that sorting finds: exactly so many, on one rank and on many."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.callbacks.parameters.selection import keep_largest, peaks

SCORE = st.one_of(
    st.floats(-(2.0**126), 2.0**126, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3.4e38, math.inf, -math.inf]),  # ties, denormals, ends
)
SCORES = st.lists(SCORE, min_size=1, max_size=40)


def alone(values):
    return values


def expected(scores, count):
    """Positions of the largest; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


@given(st.lists(SCORES, min_size=1, max_size=4), st.randoms())
def test_it_is_what_sorting_finds(layers, draw):
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in layers]
    counts = [draw.randint(0, len(scores) + 1) for scores in layers]
    masks = keep_largest([[(t, 0)] for t in tensors], counts, alone)
    assert [mask.tolist() for (mask,) in masks] == [
        expected(t.tolist(), n) for t, n in zip(tensors, counts, strict=True)
    ]


@given(SCORES, st.sampled_from([torch.bfloat16, torch.float16, torch.float64]), st.data())
def test_other_dtypes_are_compared_as_float32(scores, dtype, data):
    tensor = torch.tensor(scores).to(dtype)
    count = data.draw(st.integers(1, len(scores)))
    ((mask,),) = keep_largest([[(tensor, 0)]], [count], alone)
    assert mask.tolist() == expected(tensor.float().tolist(), count)


class Ranks:
    """Sums over threads that each play a rank, in step with one another."""

    def __init__(self, world):
        self.barrier, self.values = threading.Barrier(world), [None] * world

    def total(self, rank):
        def add(values):
            self.values[rank] = values
            self.barrier.wait()
            summed = torch.stack(self.values).sum(0)
            self.barrier.wait()
            return summed

        return add


def split(tensors, counts, cuts):
    """What ranks find that hold neighbouring slices, cut at `cuts` (shares); some may be empty."""
    edges = [0.0, *sorted(cuts), 1.0]
    world = len(edges) - 1
    ranks, by_rank = Ranks(world), [None] * world

    def play(rank):
        pieces = []
        for t in tensors:
            begin, end = round(edges[rank] * len(t)), round(edges[rank + 1] * len(t))
            pieces.append([(t[begin:end], begin)])
        by_rank[rank] = keep_largest(pieces, counts, ranks.total(rank))

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [torch.cat([of_rank[g][0] for of_rank in by_rank]).tolist() for g in range(len(tensors))]


@given(st.lists(SCORES, min_size=1, max_size=3), st.lists(st.floats(0, 1), min_size=1, max_size=3), st.randoms())
@settings(max_examples=25)
def test_ranks_with_parts_select_the_same_as_one_with_all(layers, cuts, draw):
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in layers]
    counts = [draw.randint(0, len(scores)) for scores in layers]
    whole = keep_largest([[(t, 0)] for t in tensors], counts, alone)
    assert split(tensors, counts, cuts) == [mask.tolist() for (mask,) in whole]


@given(st.lists(SCORES, min_size=2, max_size=4), st.randoms())
def test_a_group_of_pieces_is_ranked_together(layers, draw):
    scores = [score for layer in layers for score in layer]
    count = draw.randint(0, len(scores))
    pieces, start = [], 0
    for layer in layers:
        pieces.append((torch.tensor(layer, dtype=torch.float32), start))
        start += len(layer)
    (masks,) = keep_largest([pieces], [count], alone)
    assert torch.cat(masks).tolist() == expected(torch.tensor(scores, dtype=torch.float32).tolist(), count)


def test_so_many_sums_whatever_the_size():
    calls = []

    def total(values):
        calls.append(values.shape)
        return values

    scores = [torch.rand(10_000).unique(), torch.arange(12.0)]  # no ties
    masks = keep_largest([[(s, 0)] for s in scores], [5000, 6], total)
    assert calls == [torch.Size([2])] * 34
    assert [int(mask.sum()) for (mask,) in masks] == [5000, 6]


@pytest.mark.parametrize("groups", [[], [[(torch.zeros(0), 0)]]])
def test_nothing_to_find(groups):
    assert [[m.tolist() for m in masks] for masks in keep_largest(groups, [0] * len(groups), alone)] == [[[]]] * len(
        groups
    )


@given(st.lists(SCORES, min_size=1, max_size=4))
def test_peaks_are_exact(layers):
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in layers]
    assert peaks(tensors, alone) == [t.max().item() for t in tensors]
    assert peaks([torch.zeros(0)], alone) == [-math.inf]
