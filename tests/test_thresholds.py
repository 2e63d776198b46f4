"""The k-th smallest score, found by counting, is the one that sorting finds: on one rank and on many."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.callbacks.sparsity.thresholds import kth_smallest

SCORE = st.one_of(
    st.floats(0, 2.0**126, width=32),
    st.sampled_from([0.0, 1.0, 1e-45, 1e-38, 3.4e38, math.inf]),  # ties, denormals, the largest
)
SCORES = st.lists(SCORE, min_size=1, max_size=40)


def alone(values):
    return values


def expected(scores, count):
    return sorted(scores)[count - 1] if count else -1.0


@given(st.lists(SCORES, min_size=1, max_size=4), st.randoms())
def test_it_is_what_sorting_finds(layers, draw):
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in layers]
    counts = [draw.randint(0, len(scores)) for scores in layers]
    found = kth_smallest(tensors, counts, alone)
    assert found == [expected(t.tolist(), n) for t, n in zip(tensors, counts, strict=True)]


@given(SCORES, st.data())
def test_masking_what_is_not_above_it_prunes_at_least_k_and_only_ties_more(scores, data):
    tensor = torch.tensor(scores, dtype=torch.float32)
    count = data.draw(st.integers(0, len(scores)))
    (threshold,) = kth_smallest([tensor], [count], alone)
    pruned = int((tensor <= threshold).sum())
    assert pruned >= count
    assert pruned - count <= max(0, int((tensor == threshold).sum()) - 1)


@given(SCORES, st.sampled_from([torch.bfloat16, torch.float16, torch.float64]), st.data())
def test_other_dtypes_are_compared_as_float32(scores, dtype, data):
    tensor = torch.tensor(scores).to(dtype)
    count = data.draw(st.integers(1, len(scores)))
    assert kth_smallest([tensor], [count], alone) == [expected(tensor.float().tolist(), count)]


class Ranks:
    """Sums over threads that each play a rank, in step with one another."""

    def __init__(self, world):
        self.barrier, self.values = threading.Barrier(world), [None] * world

    def total(self, rank):
        def add(values):
            self.values[rank] = values
            self.barrier.wait()
            found = torch.stack(self.values).sum(0)
            self.barrier.wait()
            return found

        return add


def split(tensors, counts, world):
    """What each of `world` ranks finds when it holds every world-th element; the last may hold none."""
    ranks, found = Ranks(world), [None] * world

    def play(rank):
        found[rank] = kth_smallest([t[rank::world] for t in tensors], counts, ranks.total(rank))

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@given(st.lists(SCORES, min_size=1, max_size=3), st.integers(2, 4), st.randoms())
@settings(max_examples=25)
def test_ranks_that_hold_parts_find_the_same_as_one_that_holds_all(layers, world, draw):
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in layers]
    counts = [draw.randint(0, len(scores)) for scores in layers]
    assert split(tensors, counts, world) == [kth_smallest(tensors, counts, alone)] * world


def test_thirty_one_sums_whatever_the_size():
    calls = []

    def total(values):
        calls.append(values.shape)
        return values

    scores = [torch.rand(10_000), torch.rand(3, 4).reshape(-1)]
    found = kth_smallest(scores, [5000, 6], total)
    assert calls == [torch.Size([2])] * 31
    assert found == [torch.sort(s).values[n - 1].item() for s, n in zip(scores, [5000, 6], strict=True)]


@pytest.mark.parametrize("scores", [[], [torch.zeros(0)]])
def test_nothing_to_find(scores):
    assert kth_smallest(scores, [0] * len(scores), alone) == [-1.0] * len(scores)
