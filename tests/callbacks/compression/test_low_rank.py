"""Which rank, which factors, and that a module is what it was when they have been trained."""

import logging

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import QUIET, train
from torch import nn
from toy import fingerprint, loader, toy

from shoestring.callbacks import LowRank
from shoestring.callbacks.compression.factors import (
    LowRankLinear,
    NoSuchFactors,
    apply_low_rank,
    factorable,
    merged_state,
    rank_for_energy,
    ranks_for_budget,
    ranks_in,
    svd_factors,
)
from shoestring.callbacks.compression.low_rank import OtherRanks
from shoestring.callbacks.contract import IncompatibleTechniques, Misconfigured, Workload
from shoestring.trainer import Budget
from shoestring.trainer.checkpoint.changes import ChangedRun
from shoestring.trainer.checkpoint.weights import load_weights

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_factors_of_a_diagonal_matrix():
    """diag(4, 9, 1): the two largest singular values are 9 and 4, and what is lost is 1."""
    first, second = svd_factors(torch.diag(torch.tensor([4.0, 9.0, 1.0])), 2)
    torch.testing.assert_close(second @ first, torch.diag(torch.tensor([4.0, 9.0, 0.0])))
    torch.testing.assert_close(first.abs(), torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]))  # roots of 9 and 4
    torch.testing.assert_close(second.abs(), torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_the_error_is_the_root_of_the_squares_dropped(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    draw = torch.Generator().manual_seed(rows * 8 + columns)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=draw)
    first, second = svd_factors(weight, rank)
    assert (first.shape, second.shape) == ((rank, columns), (rows, rank))
    dropped = torch.linalg.svdvals(weight)[rank:]
    assert (weight - second @ first).norm().item() == pytest.approx(dropped.square().sum().sqrt().item(), abs=1e-12)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_no_matrix_of_the_shape_has_is_named(rank):
    with pytest.raises(NoSuchFactors, match=rf"a weight \[2, 5\] has ranks 1 to 2, and not {rank}"):
        svd_factors(torch.ones(2, 5), rank)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.98, 2), (0.99, 3), (1.0, 3)])
def test_ranks_by_energy(energy, rank):
    """Squares 64, 34 and 2 of 100: shares 0.64, 0.98 and 1."""
    assert rank_for_energy(torch.tensor([8.0, 34**0.5, 2**0.5]), energy) == rank


def test_the_rank_of_nothing_is_one():
    assert rank_for_energy(torch.zeros(4), 0.9) == 1


# two weights of 4 x 4: a component costs 8 of 16, so rank 1 is the last that saves anything; "wide" costs 12 of 32
SINGULAR = {
    "one": torch.tensor([3.0, 1.0, 0.0, 0.0]),
    "two": torch.tensor([3.0, 2.0, 0.0, 0.0]),
    "wide": torch.tensor([5.0, 3.0, 2.0, 1.0]),
}
SHAPES = {"one": (4, 4), "two": (4, 4), "wide": (8, 4)}


@pytest.mark.parametrize(
    ("parameters", "ranks"),
    [
        # 64 in all; rank 1 everywhere takes 8 + 8 + 12 = 28. Share of energy per parameter of what may come next:
        # two 4/13/8 = 0.038, wide 9/39/12 = 0.019, one 1/10/8 = 0.0125, wide's third 4/39/12 = 0.009 (8 to be dense)
        (28, {"one": 1, "two": 1, "wide": 1}),
        (35, {"one": 1, "two": 1, "wide": 1}),
        (36, {"one": 1, "wide": 1}),
        (47, {"wide": 1}),  # wide's 12 do not fit after two's 8, one's 8 do
        (48, {"one": 1, "wide": 2}),
        (56, {"wide": 2}),
        (64, {}),
    ],
)
def test_ranks_by_budget(parameters, ranks):
    assert ranks_for_budget(SINGULAR, SHAPES, parameters / 64) == ranks
    larger = {name: values * (100 if name == "one" else 1) for name, values in SINGULAR.items()}
    assert ranks_for_budget(larger, SHAPES, parameters / 64) == ranks, "what counts is a weight's own energy"


def test_a_budget_below_rank_one_is_refused():
    with pytest.raises(NoSuchFactors, match=r"budget=0\.4: rank 1 everywhere takes 0\.438"):
        ranks_for_budget(SINGULAR, SHAPES, 0.4)


@given(st.floats(0.3, 1.0), st.integers(0, 50))
def test_a_budget_is_kept(budget, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (9, 5), "b": (30, 40), "c": (16, 16)}
    singular = {n: torch.linalg.svdvals(torch.randn(shape, generator=draw)) for n, shape in shapes.items()}
    ranks = ranks_for_budget(singular, shapes, budget)
    sizes = {n: ranks[n] * sum(s) if n in ranks else s[0] * s[1] for n, s in shapes.items()}
    assert sum(sizes.values()) <= budget * sum(r * c for r, c in shapes.values())
    assert all(sizes[n] < s[0] * s[1] for n, s in shapes.items() if n in ranks)


# -- modules -----------------------------------------------------------------------------------------------------------
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2)  # reads the weight of its out_proj itself
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda *_: None)
        self.shared = nn.Linear(6, 6)
        self.twin = self.shared
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embed.weight  # tied


def test_what_may_be_factored():
    model = Model()
    assert list(factorable(model)) == ["up", "down"]
    assert list(factorable(model, ["up"])) == ["down"] == list(factorable(model, ["up.*"]))
    apply_low_rank(model, {"up": 2})
    assert list(factorable(model)) == ["down"], "factors are not factored again"
    assert factorable(nn.Linear(3, 3)) == {}, "nobody holds it who could hold another"


def test_factors_compute_what_the_product_computes():
    model, x = Model(), torch.randn(3, 6)
    up = model.up
    assert apply_low_rank(model, {"up": 6, "down": 2}).keys() == {"up", "down"}
    assert isinstance(model.up, LowRankLinear) and model.up.bias is up.bias
    torch.testing.assert_close(model.up(x), up(x))  # full rank
    torch.testing.assert_close(model.down(up(x)), nn.functional.linear(up(x), model.down.weight))
    assert torch.linalg.matrix_rank(model.down.weight, rtol=1e-5) == 2
    with pytest.raises(NoSuchFactors, match="up is a LowRankLinear"):
        apply_low_rank(model, {"up": 2})


def test_code_that_reads_weights_still_finds_them():
    """PyTorch's own encoder does, without gradients."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True).eval()
    apply_low_rank(encoder, {"linear1": 2, "linear2": 2})
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = encoder(x)
    torch.testing.assert_close(fast, encoder(x).detach())


def test_factors_travel_by_file():
    trained = Model()
    apply_low_rank(trained, {"up": 2, "down": 3})
    nn.init.normal_(trained.up.first.weight)
    state, fresh = trained.state_dict(), Model()
    assert ranks_in(fresh, state) == {"up": 2, "down": 3} and ranks_in(fresh, fresh.state_dict()) == {}
    apply_low_rank(fresh, ranks_in(fresh, state))
    fresh.load_state_dict(state)
    assert fingerprint(fresh.state_dict()) == fingerprint(state)
    plain = Model()
    plain.load_state_dict(merged_state(plain, state))
    assert torch.equal(plain.up.weight, trained.up.weight) and torch.equal(plain.down.weight, trained.down.weight)
    assert torch.equal(plain.up.bias, trained.up.bias)


# -- a run -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "named"),
    [({"energy": 0}, "energy=0"), ({"energy": 1.1}, "energy=1.1"), ({"budget": 0.0}, "budget=0.0")],
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(Misconfigured, match=f"low_rank: {named}"):
        LowRank(**settings).check()


def run(folder, technique, module, steps=12, **options):
    return train(
        folder, Budget(steps=steps), module=module, techniques=[technique], data=loader(),
        accumulate_grad_batches=2, **options,
    )  # fmt: skip


def test_the_file_has_the_factors_and_the_module_their_product(tmp_path):
    technique, module = LowRank(energy=0.7), toy()
    head, before = module.head, module.head.weight.detach().clone()
    run(tmp_path, technique, module)
    ranks, state = technique.ranks(), load_weights(tmp_path / "final")
    assert ranks["head"] == rank_for_energy(torch.linalg.svdvals(before), 0.7) == 3
    assert module.head is head and module.head.weight.grad is None
    assert ranks_in(toy(), state) == ranks
    assert torch.equal(module.head.weight, state["head.second.weight"] @ state["head.first.weight"])
    assert torch.linalg.matrix_rank(module.head.weight, rtol=1e-5) == 3
    assert not torch.allclose(module.head.weight, before, atol=1e-3), "they were trained"
    assert fingerprint(merged_state(toy(), state)) == fingerprint(module.state_dict())
    held = sum(t.numel() for n, t in state.items() if n.startswith("head"))
    assert held == 3 * (7 + 11) + 7 < before.numel() + 7


def test_factors_may_stay(tmp_path):
    technique, module = LowRank(budget=0.6, skip=["head"], keep_factors=True), toy()
    trainer = run(tmp_path, technique, module)
    kept = {name for name, part in module.named_modules() if isinstance(part, LowRankLinear)}
    assert kept == technique.ranks().keys() and "head" not in kept
    dense = 4 * 23 * 11
    assert sum(r * (23 + 11) for r in technique.ranks().values()) <= 0.6 * dense
    assert trainer.monitor.totals.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_what_saves_nothing_is_left_alone_and_said(tmp_path, caplog):
    technique, module = LowRank(energy=0.999), toy()
    with caplog.at_level(logging.WARNING, "shoestring"):
        run(tmp_path, technique, module, steps=1)
    assert technique.ranks() == {} and "leaves every layer as it is" in caplog.text


def test_nothing_to_factor_is_an_error(tmp_path):
    with pytest.raises(IncompatibleTechniques, match=r"no linear layer of Toy .* skip=\['\*'\]"):
        run(tmp_path, LowRank(skip=["*"]), toy())


class Early(pl.LightningModule):
    """Chooses what it trains when it is made, as some modules do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)
        self.chosen = list(self.net.parameters())

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.chosen, lr=0.1)


def test_factors_that_nobody_would_train_are_an_error(tmp_path):
    with pytest.raises(IncompatibleTechniques, match="the optimizer does not train net, which has been replaced"):
        train(tmp_path, Budget(steps=2), module=Early(), techniques=[LowRank(energy=0.5)])


def test_resuming_with_other_settings_is_an_error(tmp_path):
    run(tmp_path, LowRank(energy=0.7), toy(), steps=2)
    with pytest.raises(ChangedRun, match=r"'energy': 0\.7.* -> .*'energy': 0\.5"):
        run(tmp_path, LowRank(energy=0.5), toy(), steps=4)
    technique = LowRank(energy=0.7)
    with pytest.raises(OtherRanks, match=r"\{'head': 4\}.* give \{\}"):
        technique.load_state_dict({"ranks": {"head": 4}})


def test_only_a_budget_is_predicted():
    work = Workload(parameters=10, layers=1, sequence_length=1, tokens_per_step=1.0, steps=1)
    assert LowRank(energy=0.5).predict(work).flops == 1.0
    assert LowRank(budget=0.5).predict(work).flops == LowRank(budget=0.5).predict(work).states == 0.5
