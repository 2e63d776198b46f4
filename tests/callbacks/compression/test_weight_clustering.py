"""Codebooks by hand, on many ranks and on disk; and a run that ends with the few values it computed with."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import QUIET, train
from torch import nn
from toy import loader, toy

from shoestring.callbacks import GradualPruning, WeightAveraging, WeightClustering
from shoestring.callbacks.compression.codebooks import (
    NotInCodebook,
    clustered,
    decode,
    encode,
    first_codebooks,
    kmeans_1d,
    lloyd,
    nearest,
)
from shoestring.callbacks.contract import IncompatibleTechniques, Misconfigured
from shoestring.callbacks.forward.forward_weights import NeverUsed, straight_through
from shoestring.trainer import Budget
from shoestring.trainer.checkpoint.weights import load_weights

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

VALUES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60)


# -- by hand -----------------------------------------------------------------------------------------------------------
def book(values, clusters, **options):
    return kmeans_1d(torch.tensor(values), clusters, **options).tolist()


def test_kmeans_by_hand():
    """From 0 and 12: ten zeros and the 5 lie below 6, the others above; then the 5 lies above (5/11 + 26/3) / 2."""
    values = [0.0] * 10 + [5.0, 7.0, 7.0, 12.0]
    assert book(values, 2, iterations=1) == pytest.approx([5 / 11, 26 / 3])
    assert book(values, 2, iterations=2) == [0.0, 7.75]
    assert book(values, 2, iterations=50) == [0.0, 7.75]


def test_the_range_is_cut_evenly_and_zero_belongs_to_it():
    values = [torch.tensor([2.0, 8.0]), torch.tensor([-1.0, 4.0])]
    (one, two) = first_codebooks(values, 3, "linear", False, lambda sums: sums)
    assert (one.tolist(), two.tolist()) == ([0.0, 4.0, 8.0], [-1.0, 1.5, 4.0])


def test_quantiles_begin_where_the_weights_are():
    """Of eight values, the middles of four quarters are the first, third, fifth and seventh."""
    values = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0, 50.0, 60.0, 100.0])
    (codebook,) = first_codebooks([values], 4, "density", False, lambda sums: sums)
    torch.testing.assert_close(codebook, torch.tensor([1.0, 2.0, 3.0, 60.0]), rtol=0, atol=1e-4)
    (codebook,) = first_codebooks([torch.cat([values, torch.zeros(90)])], 5, "density", True, lambda sums: sums)
    torch.testing.assert_close(codebook, torch.tensor([0.0, 1.0, 2.0, 3.0, 60.0]), rtol=0, atol=1e-4)


def test_zero_keeps_a_centroid():
    """From -4, 2.5, 9: -1 lies below -0.75, so the means are -5/2, 2/3, 9, and stay. With 0 for 2.5 nothing moves."""
    values = [-4.0, -1.0, 0.0, 0.0, 2.0, 9.0]
    assert book(values, 3) == pytest.approx([-2.5, 2 / 3, 9.0])
    assert book(values, 3, keep_zero=True) == [-4.0, 0.0, 9.0]
    with pytest.raises(ValueError, match="2 clusters are too few: use 3 or more with keep_zero=True"):
        book(values, 2, keep_zero=True)


def test_ties_go_down_and_idle_centroids_stay():
    assert nearest(torch.tensor([-5.0, 1.0, 1.1, 3.0, 9.0]), torch.tensor([0.0, 2.0, 4.0])).tolist() == [0, 0, 1, 1, 2]
    assert lloyd([torch.tensor([3.0, 5.0])], [torch.tensor([0.0, 1.0, 4.5])], False, 3, lambda s: s)[0].tolist() == [
        0.0, 1.0, 4.0,
    ]  # fmt: skip


@given(VALUES, st.integers(3, 12), st.sampled_from(["linear", "density"]), st.booleans())
def test_more_iterations_never_fit_worse(values, clusters, init, keep_zero):
    tensor = torch.tensor(values)
    options = {"init": init, "keep_zero": keep_zero}
    errors = []
    for iterations in (1, 3, 9):
        codebook = kmeans_1d(tensor, clusters, iterations=iterations, **options)
        assert codebook.shape == (clusters,) and (codebook.diff() >= 0).all()
        assert not keep_zero or 0.0 in codebook.tolist()
        errors.append((clustered(tensor, codebook) - tensor).double().square().sum().item())
    assert errors[2] <= errors[1] + 1e-3 and errors[1] <= errors[0] + 1e-3


def spread(values, world, clusters, init):
    """The codebook that each of `world` ranks finds; rank r holds every world-th value, maybe none."""
    barrier, summands, codebooks = threading.Barrier(world), [None] * world, [None] * world

    def play(rank):
        def total(sums):
            summands[rank] = sums
            barrier.wait()
            result = torch.stack(summands).sum(0)
            barrier.wait()
            return result

        mine = [values[rank::world]]
        codebooks[rank] = lloyd(mine, first_codebooks(mine, clusters, init, True, total), True, 7, total)[0]

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codebooks


@given(VALUES, st.integers(2, 4), st.sampled_from(["linear", "density"]))
@settings(max_examples=25)
def test_ranks_with_parts_compute_the_same_bits(values, world, init):
    tensor = torch.tensor(values)
    alone = kmeans_1d(tensor, 5, init=init, keep_zero=True, iterations=7)
    assert all(torch.equal(codebook, alone) for codebook in spread(tensor, world, 5, init))


# -- storage -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("clusters", "held"), [(2, 5), (3, 9), (4, 9), (5, 18), (16, 18), (17, 35), (256, 35)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_returns_from_storage_bit_for_bit(clusters, held, dtype):
    codebook = torch.randn(clusters, generator=torch.Generator().manual_seed(0)).sort().values.to(dtype)
    weight = clustered(torch.randn(5, 7), codebook.float()).to(dtype)
    indices, values = encode(weight, codebook.float())
    assert indices.dtype == torch.uint8 and indices.shape == (held,)
    assert torch.equal(decode(indices, values, weight.shape).to(dtype), weight)


def test_bytes_by_hand():
    weight = torch.tensor([[2.0, 0.0, -1.0], [0.0, 2.0, 2.0]])  # 2 1 0 1 | 2 2
    indices, _ = encode(weight, torch.tensor([-1.0, 0.0, 2.0]))
    assert indices.tolist() == [0b10_01_00_01, 0b10_10_00_00]
    indices, _ = encode(weight, torch.tensor([-1.0, 0.0, 2.0, 3.0, 4.0]))
    assert indices.tolist() == [0x21, 0x01, 0x22]


def test_what_is_not_in_the_codebook_is_refused():
    with pytest.raises(NotInCodebook, match=r"1 weights, such as 0\.5, are not among the 2 values"):
        encode(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0]))
    with pytest.raises(NotInCodebook, match="at most 256 values, but this one has 257"):
        encode(torch.zeros(1), torch.arange(257.0))


# -- a run -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"clusters": 1}, "clusters=1 .* from 3 to 256"),
        ({"clusters": 257}, "clusters=257"),
        ({"clusters": 2}, "clusters=2 .* from 3"),
        ({"every": 0}, "every=0"),
        ({"iterations": 0}, "iterations=0"),
        ({"init": "random"}, r"init='random' is not allowed; use linear \| density"),
    ],
)
def test_settings_out_of_range_are_named(wrong, named):
    with pytest.raises(Misconfigured, match=f"weight_clustering: {named}"):
        WeightClustering(**wrong).check()
    WeightClustering(clusters=2, keep_zero=False).check()


def run(folder, *techniques, module=None):
    module = module or toy(dropout=0.0)
    train(
        folder, Budget(steps=12), module=module, techniques=techniques, data=loader(), accumulate_grad_batches=2,
    )  # fmt: skip
    return module, load_weights(folder / "final")


HIDDEN = [f"blocks.{i}.{name}.weight" for i in range(2) for name in ("wide", "narrow")]


def test_the_final_weights_are_those_it_computed_with(tmp_path):
    technique = WeightClustering(clusters=5, start="25%", every=4, skip=["head.*"])
    module, final = run(tmp_path, technique)
    books = technique.codebooks()
    assert list(books) == HIDDEN
    for name, codebook in books.items():
        assert set(final[name].unique().tolist()) <= set(codebook.tolist()) and 0.0 in codebook.tolist()
        indices, values = encode(final[name], codebook)
        assert torch.equal(decode(indices, values, final[name].shape), module.get_parameter(name))
        assert indices.numel() == -(-final[name].numel() // 2)
    assert final["head.weight"].unique().numel() == final["head.weight"].numel()


def test_forward_uses_codebooks_from_the_start_on(tmp_path):
    module, seen = toy(dropout=0.0), []
    layer = module.blocks[0].wide
    plain = layer.forward

    def forward(x):
        if module.training:
            seen.append(layer.weight.detach().unique().numel())
            assert layer.weight.requires_grad
        return plain(x)

    layer.forward = forward
    run(tmp_path, WeightClustering(clusters=5, start="50%", every=2), module=module)
    assert seen[:12] == [23 * 11] * 12, "six steps of two micro-batches"
    assert len(seen) == 24 and all(count <= 5 for count in seen[12:])


def test_the_gradient_goes_straight_through():
    """Of a sum of products it is the other factor, whichever centroid the weight is shown as."""
    weight = torch.tensor([0.4, 0.6, 2.0], requires_grad=True)
    shown = straight_through(weight, clustered(weight.detach(), torch.tensor([0.0, 1.0])))
    (shown * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
    assert shown.tolist() == [0.0, 1.0, 1.0] and weight.grad.tolist() == [3.0, 5.0, 7.0]


def test_pruned_stays_pruned(tmp_path):
    pruning = GradualPruning(sparsity=0.6, start="0%", end="50%", every=1)
    _, final = run(tmp_path, pruning, WeightClustering(clusters=5, start="60%", every=2))
    for name in HIDDEN:
        assert (final[name] == 0).float().mean() >= 1 - pruning.densities()[name]
        assert final[name].unique().numel() <= 5


def test_averages_are_clustered_at_the_end(tmp_path):
    technique = WeightClustering(clusters=5, start="25%", every=2)
    _, final = run(tmp_path, WeightAveraging(decay=0.5), technique)
    for name, codebook in technique.codebooks().items():
        assert set(final[name].unique().tolist()) <= set(codebook.tolist())


def test_never_begun_is_never_clustered(tmp_path):
    technique = WeightClustering(start="50 steps")
    _, final = run(tmp_path, technique)
    assert technique.codebooks() == {} and final[HIDDEN[0]].unique().numel() > 200


def test_a_layer_whose_weight_another_module_reads_is_named(tmp_path):
    class Attending(type(toy())):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(11, 1, batch_first=True)

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(self.attention(x, x, x)[0].mean(1))

    torch.manual_seed(0)
    with pytest.raises(NeverUsed, match=r"weight_clustering: .*attention\.out_proj\.weight"):
        run(tmp_path, WeightClustering(start="0%"), module=Attending())


def test_nothing_to_cluster_is_an_error(tmp_path):
    with pytest.raises(IncompatibleTechniques, match=r"finds no layers after skip=\['\*'\]"):
        run(tmp_path, WeightClustering(skip=["*"]))
