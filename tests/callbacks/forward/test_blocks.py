"""Calls around one block nest as declared, whoever came first, and leave nothing behind."""

import copy
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoestring.callbacks.forward.blocks import PLACES, blocks, costs_like, recorded, unwrap_copies, wrap_block


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.inside(x)


def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def noting(seen, name):
    def call(inner, *args):
        seen.append(name)
        return inner(*args)

    return call


@pytest.mark.parametrize("order", list(permutations(PLACES)), ids="-".join)
def test_places_nest_from_the_outside_in(order):
    net, seen = model(), []
    removals = [wrap_block(net[0], place, noting(seen, place)) for place in order]
    net(torch.zeros(1, 3))
    assert tuple(seen) == PLACES
    for remove in removals:
        remove(), remove()
    assert type(net[0]) is Block


def test_the_newest_of_a_place_is_outermost():
    net, seen = model(), []
    for name in ("first", "second"):
        wrap_block(net[0], "watch", noting(seen, name))
    net(torch.zeros(1, 3))
    assert seen == ["second", "first"]


@given(st.lists(st.sampled_from(PLACES), max_size=6), st.randoms())
def test_taken_away_in_any_order_the_block_is_what_it_was(places, random):
    net = model()
    removals = [wrap_block(net[1], place, lambda inner, *args: inner(*args)) for place in places]
    random.shuffle(removals)
    for remove in removals:
        assert len(blocks(net)) == 2, "still a block like its neighbours"
        remove()
    assert type(net[1]) is Block and vars(net[1]).keys() == vars(net[0]).keys()


def test_hooks_are_inside_and_outputs_are_seen_after_them():
    net, x = model(), torch.ones(1, 3)
    net[0].register_forward_hook(lambda block, args, output: output * 2)
    with recorded(blocks(net)) as outputs:
        net(x)
    assert torch.equal(outputs[0], 2 * (x + net[0].inside(x)))


def test_a_skipped_block_is_not_computed():
    net, x, computed = model(), torch.ones(1, 3), []
    net[0].inside.register_forward_hook(lambda *_: computed.append(0))
    wrap_block(net[0], "recompute", noting(computed, "recompute"))
    wrap_block(net[0], "skip", lambda inner, x: x)
    assert torch.equal(net(x), net[1](x)) and not computed


def test_a_copy_is_left_to_itself():
    net, seen = model(), []
    remove = wrap_block(net[0], "skip", noting(seen, "skip"))
    copied = copy.deepcopy(net)
    unwrap_copies(copied)
    copied(torch.zeros(1, 3))
    assert not seen and type(copied[0]) is Block
    net(torch.zeros(1, 3))
    assert seen == ["skip"]
    remove()
    assert type(net[0]) is Block


def test_blocks_cost_alike_where_shapes_and_calls_around_them_are():
    net = nn.Sequential(Block(), Block(), Block())
    net[2].inside = nn.Linear(3, 4)
    assert costs_like(net[0]) == costs_like(net[1]) != costs_like(net[2])
    wrap_block(net[0], "recompute", lambda inner, *args: inner(*args))
    assert costs_like(net[0]) != costs_like(net[1])
    wrap_block(net[1], "recompute", lambda inner, *args: inner(*args))
    assert costs_like(net[0]) == costs_like(net[1])
