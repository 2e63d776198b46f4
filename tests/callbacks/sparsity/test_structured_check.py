"""A cut is kept only where the small model computes what the whole one does with the cut channels at zero."""

from __future__ import annotations

import time

import pytest
import torch
from fits import llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.callbacks.parameters.cut import shrink
from shoestring.callbacks.sparsity.structured_check import CannotTrace, check_cut
from shoestring.callbacks.sparsity.structured_groups import choose

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Parts by name, and what is computed with them."""

    def __init__(self, compute, **parts: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.compute(self, x)


def cut_of(model: nn.Module, x: torch.Tensor):
    squares = {name: p.detach().square() for name, p in model.named_parameters()}
    return choose(model, lambda: model(x), squares, ratio=0.5, round_to=1)


def split(m, x):
    narrow, wide = m.a(x).split([6, 10], -1)
    return m.b(narrow.relu()) + m.c(wide.relu())


_draw = torch.Generator().manual_seed(0)  # the same, whatever has been imported before
ROWS, MAPS = torch.randn(2, 16, generator=_draw), torch.randn(2, 4, 8, 8, generator=_draw)
MISLEADING = {
    "permuted before a flatten": (
        lambda m, x: m.o(m.a(x).relu().permute(0, 2, 3, 1).flatten(1)),
        {"a": nn.Conv2d(4, 8, 3), "o": nn.Linear(288, 4)}, MAPS, "computes something else .* layer of a, o",
    ),
    "rolled": (
        lambda m, x: m.o(m.a(x).relu().roll(1, -1)), {"a": nn.Linear(16, 8), "o": nn.Linear(8, 4)}, ROWS,
        "computes something else",
    ),
    "pooled over channels": (
        lambda m, x: m.o(nn.functional.max_pool1d(m.a(x).relu()[:, None], 2)[:, 0]),
        {"a": nn.Linear(16, 8), "o": nn.Linear(4, 4)}, ROWS, "which channels go together",
    ),
    "split unevenly": (
        split, {"a": nn.Linear(16, 16), "b": nn.Linear(6, 4), "c": nn.Linear(10, 4)}, ROWS, "which channels",
    ),
    "a width in the forward": (
        lambda m, x: m.o(m.a(x).view(-1, 2, 4).sum(1)), {"a": nn.Linear(16, 8), "o": nn.Linear(4, 4)}, ROWS,
        "does not run with fewer channels|which channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISLEADING)
def test_what_the_graph_gets_wrong_is_refused_and_nothing_is_changed(name):
    torch.manual_seed(0)
    compute, parts, x, said = MISLEADING[name]
    for part in parts.values():
        part.reset_parameters()  # they were drawn as this file was imported, whatever had drawn before
    model = Net(compute, **parts)
    before, wanted = {n: p.shape for n, p in model.named_parameters()}, model(x)
    with pytest.raises(CannotTrace, match=said):
        cut_of(model, x)
    assert {n: p.shape for n, p in model.named_parameters()} == before and torch.equal(model(x), wanted)
    assert model.training and model.a.training


def test_a_layer_norm_over_cut_channels_is_compared_over_those_that_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    cut = cut_of(model, ROWS)
    shrink(model, cut)
    assert model[1].normalized_shape == (4,) and model(ROWS).shape == (2, 4)


def test_group_norms_keep_their_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    assert "0.weight" not in cut_of(model, MAPS).kept


def test_an_honest_cut_of_another_model_fails_the_check():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    cut = cut_of(model, ROWS)
    check_cut(model, lambda: model(ROWS), cut)
    moved = Net(lambda m, x: m.net[2](m.net[1](m.net[0](x)).flip(-1)), net=model)
    renamed = type(cut)({f"net.{n}": k for n, k in cut.kept.items()}, {f"net.{n}": s for n, s in cut.sizes.items()})
    with pytest.raises(CannotTrace, match="computes something else"):
        check_cut(moved, lambda: moved(ROWS), renamed)


def test_grouped_query_attention_stays_whole_and_the_rest_is_cut_in_seconds():
    """Tracing shared keys goes in circles; feed-forward layers are cut all the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.arange(8)[None]
    squares = {name: p.detach().square() for name, p in model.named_parameters()}
    began = time.process_time()
    cut = choose(model, lambda: model(ids).logits, squares, ratio=0.5, round_to=1)
    assert time.process_time() - began < 30
    assert {name.split(".")[-2] for name in cut.kept} == {"gate_proj", "up_proj", "down_proj"}
    whole = llama(layers=1)
    squares = {name: p.detach().square() for name, p in whole.named_parameters()}
    assert choose(whole, lambda: whole(ids).logits, squares, ratio=0.5, round_to=1).kept
