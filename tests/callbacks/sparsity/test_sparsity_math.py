"""What is kept, where, in which shape and when: by hand, and as properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoestring.callbacks import SET, LotteryTicket, RigL
from shoestring.callbacks.contract import IncompatibleTechniques
from shoestring.callbacks.parameters.shards import Shards
from shoestring.callbacks.sparsity import distributions, patterns, saliency, schedules
from shoestring.callbacks.sparsity.at_init import PruneAtInit
from shoestring.callbacks.sparsity.grasp import hessian_times
from shoestring.callbacks.sparsity.masks import select, select_blocks


# -- where -------------------------------------------------------------------------------------------------------------
def test_erk_by_hand():
    """4x4 and 2x8 at 50 %: 16 of 32 stay; epsilon = 16 / (8 + 10)."""
    densities = distributions.erk({"a": (4, 4), "b": (2, 8)}, 0.5)
    assert densities == pytest.approx({"a": 8 / 16 * 16 / 18, "b": 10 / 16 * 16 / 18})


def test_erk_makes_a_layer_dense_and_the_others_pay():
    """1x2 would have density 1.5 * 51 / 23 > 1, so 10x10 keeps 51 - 2 of its 100."""
    assert distributions.erk({"c": (1, 2), "d": (10, 10)}, 0.5) == pytest.approx({"c": 1.0, "d": 0.49})


def test_erk_of_a_convolution_counts_its_kernel():
    densities = distributions.erk({"conv": (8, 4, 3, 3), "head": (100, 100)}, 0.9)
    raw = {"conv": (8 + 4 + 3 + 3) / 288, "head": 200 / 10000}
    scale = 0.1 * 10288 / (18 + 200)
    assert densities == pytest.approx({name: share * scale for name, share in raw.items()})


SHAPES = st.dictionaries(
    st.text("abc", min_size=1), st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5
)


@given(SHAPES, st.floats(0, 0.99))
def test_every_distribution_keeps_the_requested_total(shapes, sparsity):
    size = sum(a * b for a, b in shapes.values())
    for name in ("uniform", "erk"):
        shares = distributions.densities(name, shapes, sparsity)
        assert all(0 <= share <= 1 for share in shares.values())
        assert sum(share * shapes[n][0] * shapes[n][1] for n, share in shares.items()) == pytest.approx(
            (1 - sparsity) * size
        )
        kept = distributions.keep(shares, shapes)
        assert -1e-6 < sum(kept.values()) - (1 - sparsity) * size < len(shapes) + 1e-6


def test_patterns_of_names_have_their_own_sparsity():
    shapes = {"head.weight": (2, 2), "blocks.0.weight": (2, 2), "blocks.1.weight": (2, 2)}
    densities = distributions.densities({"head.*": 0.0, "blocks.1.*": 0.75}, shapes, 0.5)
    assert densities == {"head.weight": 1.0, "blocks.0.weight": 0.5, "blocks.1.weight": 0.25}


# -- what --------------------------------------------------------------------------------------------------------------
def test_saliencies_by_hand():
    w, g = torch.tensor([2.0, -3.0, 0.0]), torch.tensor([-1.0, 0.5, 4.0])
    assert saliency.magnitude(w).tolist() == [2, 3, 0]
    assert saliency.gradient(g).tolist() == [1, 0.5, 4]
    assert saliency.taylor(w, g).tolist() == [2, 1.5, 0]
    assert saliency.movement(torch.tensor([1.0, 1.0, 1.0]), w, g).tolist() == [3, 2.5, 1]
    assert saliency.wanda(w.view(1, 3), torch.tensor([1.0, 10.0, 5.0])).tolist() == [[2, 30, 0]]


def test_random_scores_belong_to_the_moment_and_the_parameter():
    first = saliency.random(9, 1, "a", 3)
    assert torch.equal(first, saliency.random(9, 1, "a", 3))
    assert not any(
        torch.equal(first, other)
        for other in (saliency.random(9, 1, "a", 4), saliency.random(9, 1, "b", 3), saliency.random(9, 2, "a", 3))
    )


def test_the_hessian_times_the_gradient_of_a_quadratic():
    """L = w^T A w / 2: g = A w and H g = A A w."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    w = nn.Parameter(torch.tensor([1.0, -1.0]))
    gradient = a @ w.detach()
    (product,) = hessian_times(w @ a @ w / 2, [w], [gradient])
    assert torch.allclose(product, a @ gradient)


# -- shape -------------------------------------------------------------------------------------------------------------
def test_two_of_four_by_hand():
    score = torch.tensor([[4.0, 1, 3, 2, 0, 0, 0, 0], [1, 2, 3, 4, 9, 0, 8, 7]])
    assert patterns.n_m(score, 2, 4).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 1, 0]]
    assert patterns.n_m(score[:, :6], 1, 4).int().tolist() == [[1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0]]


@given(st.integers(1, 5), st.integers(1, 13), st.integers(1, 6), st.data())
def test_no_group_keeps_more_than_n(rows, columns, m, data):
    n = data.draw(st.integers(1, m))
    mask = patterns.n_m(torch.rand(rows, columns), n, m)
    for start in range(0, columns, m):
        group = mask[:, start : start + m]
        assert (group.sum(1) == min(n, group.shape[1])).all()


def test_blocks_by_hand():
    score = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 9], [2, 2, 0, 0], [2, 2, 0, 0]])
    assert patterns.blocks(score, (2, 2), 0.5).int().tolist() == [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    assert patterns.blocks(score, (1, 0), 0.5).int().tolist() == [[0] * 4, [1] * 4, [1] * 4, [0] * 4]
    assert patterns.blocks(score, (0, 1), 0.25).int().tolist() == [[0, 0, 0, 1]] * 4


@pytest.mark.parametrize("pattern", ["", "2", "0x4", "4x", "x", "2:4", "4X4"])
def test_what_is_no_block_is_refused(pattern):
    with pytest.raises(ValueError):
        patterns.block_of(pattern)


# -- when --------------------------------------------------------------------------------------------------------------
def test_the_drop_fraction_is_a_cosine():
    assert [round(schedules.cosine_decay(t, 0.3), 6) for t in (0, 0.5, 1, 2)] == [0.3, 0.15, 0, 0]


def test_rounds_keep_the_same_share_each():
    shares = [schedules.rounds(i, 3, 0.875) for i in range(4)]
    assert shares == pytest.approx([0, 0.5, 0.75, 0.875])


# -- moves of connections, by hand -------------------------------------------------------------------------------------
def shards_with(weight, gradient):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    layer.weight.grad = gradient.clone()
    return Shards(layer, [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)])


def dynamic(cls, mask):
    technique = cls(sparsity=0.5)
    technique._names, technique._masks, technique._seed = ["weight"], {"weight": mask.reshape(-1)}, 0
    technique._kept, technique.mask_version = {"weight": float(mask.float().mean())}, 0
    return technique


WEIGHT = torch.tensor([[0.9, -0.1, 0.0, 0.0], [0.3, -0.8, 0.0, 0.0]])
GRADIENT = torch.tensor([[9.0, 9.0, -2.0, 1.0], [9.0, 9.0, 0.5, -3.0]])
MASK = WEIGHT != 0


def test_one_update_of_rigl():
    """Four of eight are active; half of them go: -0.1 and 0.3. |g| is largest at these two, so both regrow at once."""
    shards = shards_with(WEIGHT, GRADIENT)
    mask = dynamic(RigL, MASK)._move(shards, 0.5, 3)["weight"].view(2, 4)
    assert torch.equal(mask, MASK)
    quiet = torch.where(MASK, 0.0, GRADIENT)
    mask = dynamic(RigL, MASK)._move(shards_with(WEIGHT, quiet), 0.5, 3)["weight"].view(2, 4)
    assert mask.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]], "where |g| is 2 and 3"


def test_what_grows_starts_at_zero_with_fresh_moments():
    shards = shards_with(WEIGHT, torch.where(MASK, 0.0, GRADIENT))
    shards.optimizers[0].state[shards.parameters["weight"]]["momentum_buffer"] = WEIGHT.clone() * 2
    technique = dynamic(RigL, MASK)
    technique.apply_masks(shards, technique._move(shards, 0.5, 3))
    assert torch.equal(shards.master("weight").view(2, 4), torch.tensor([[0.9, 0, 0, 0], [0, -0.8, 0, 0]]))
    assert shards.state("weight")["momentum_buffer"].count_nonzero() == 2


@given(st.floats(0, 1), st.integers(0, 100))
def test_set_keeps_the_number_of_connections(fraction, step):
    technique = dynamic(SET, MASK)
    mask = technique._move(shards_with(WEIGHT, GRADIENT), fraction, step)["weight"]
    assert mask.sum() == 4
    assert (mask & MASK.reshape(-1)).sum() >= 4 - int(fraction * 4)


def test_all_layers_ranked_together():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    shards = Shards(net, [])
    scores = {"0.weight": torch.tensor([1.0, 2, 3, 4]), "1.weight": torch.tensor([5.0, 0.5])}
    masks = select(shards, scores, "global", 0.5)
    assert {name: mask.int().tolist() for name, mask in masks.items()} == {"0.weight": [0, 0, 1, 1], "1.weight": [1, 0]}
    masks = select_blocks(shards, {"0.weight": scores["0.weight"]}, (1, 0), {"0.weight": 0.5})
    assert masks["0.weight"].int().tolist() == [0, 0, 1, 1]


def test_a_ticket_returns_to_where_it_was():
    shards = shards_with(WEIGHT, GRADIENT)
    ticket = LotteryTicket(sparsity=0.5)
    ticket._rewound = {"weight": torch.full((8,), 7.0)}
    ticket._masks, ticket._kept, ticket.mask_version = {}, {}, 0
    shards.optimizers[0].state[shards.parameters["weight"]] = {"momentum_buffer": WEIGHT.clone(), "step": 4}
    ticket._return(shards)
    ticket.apply_masks(shards, {"weight": MASK.reshape(-1)})
    assert torch.equal(shards.master("weight").view(2, 4), 7.0 * MASK)
    assert shards.state("weight")["momentum_buffer"].count_nonzero() == 0
    assert shards.scalars("weight")["step"] == 0 and shards.gradient("weight").count_nonzero() == 0


def test_nan_scores_are_refused():
    class Bad(PruneAtInit):
        card = RigL.card

    with pytest.raises(IncompatibleTechniques, match="scores of a are not finite"):
        Bad()._choose({"a": torch.tensor([1.0, float("nan")])})
