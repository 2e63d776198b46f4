"""Pruning without training: by hand, and what each method is better at."""

import pytest
import torch
from torch import nn

from shoestring.trainer.export.one_shot import (
    CannotPrune,
    keep_mask,
    prune_one_shot,
    prune_weight,
    sparsegpt,
    wanda_scores,
)
from shoestring.trainer.export.quantize import quantize


def reconstruction_error(weight, pruned, hessian):
    """|X W^T - X P^T|^2 over the calibration set, from X^T X alone."""
    change = (weight - pruned).double()
    return float(((change @ hessian.double()) * change).sum())


def calibration(rows=512, columns=32, outliers=(3, 17), seed=0, mixed=True):
    """Inputs with correlated features, a few of which are twenty times as large: what transformers have inside."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw)
    if mixed:
        x = x @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=draw))
    x[:, list(outliers)] *= 20
    return x


def weights(out=24, columns=32, seed=1):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_masks_by_hand():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 5.0]])
    assert keep_mask(scores, 0.5).tolist() == [[True, False, True, False], [False, False, True, True]]
    assert keep_mask(scores, 0.3).sum(1).tolist() == [3, 3], "one of four is the most that 30 % allow"
    assert keep_mask(scores, 0.0, (1, 2)).tolist() == [[True, False, True, False], [False, True, False, True]]
    assert keep_mask(torch.rand(5, 10), 0.3).sum(1).tolist() == [7] * 5, "three of ten, whatever floats say"
    with pytest.raises(CannotPrune, match="rows of 4 weights cannot be cut in groups of 3"):
        keep_mask(scores, 0.0, (1, 3))


def test_wanda_by_hand():
    """Inputs of norms 1 and 10: a weight of 0.5 at the second matters more than one of 2 at the first."""
    x = torch.tensor([[0.6, 6.0], [0.8, 8.0]])
    weight = torch.tensor([[2.0, 0.5]])
    assert torch.allclose(wanda_scores(weight, x.T @ x), torch.tensor([[2.0, 5.0]]))
    assert prune_weight(weight, x.T @ x, "wanda", 0.5).tolist() == [[0.0, 0.5]]
    assert prune_weight(weight, x.T @ x, "magnitude", 0.5).tolist() == [[2.0, 0.0]]


def test_sparsegpt_by_hand():
    """Two inputs that are nearly the same: removing the first weight moves it to the second.

    H = [[1, a], [a, 1]] d with a = 0.9 / 1.01 after 1 % damping: w = (1, 2) becomes (0, 2 + a).
    """
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    pruned = sparsegpt(torch.tensor([[1.0, 2.0]]), hessian, 0.5)
    assert pruned.tolist() == [[0.0, pytest.approx(2 + 0.9 / 1.01, rel=1e-6)]]
    # by the inverse Hessian the costs are 1 (1 - a^2) for the first and 4 for the second, were the first fixed
    assert sparsegpt(torch.tensor([[3.0, 1.0]]), hessian, 0.5).tolist() == [[3.0, 0.0]], "nothing is right of the last"


def test_sparsegpt_without_correlations_is_wanda_over_the_layer():
    """A diagonal Hessian leaves nothing to correct; the weights compete as |w| |x| over all rows of the block."""
    weight = torch.tensor([[1.0, 5.0], [4.0, 0.1]])
    hessian = torch.diag(torch.tensor([4.0, 1.0]))
    pruned = sparsegpt(weight, hessian, 0.5)
    assert pruned.tolist() == [[0.0, 5.0], [4.0, 0.0]]


def test_dead_inputs_lose_their_weights():
    x = calibration()
    x[:, 5] = 0
    pruned = sparsegpt(weights(), x.T @ x, 0.25)
    assert (pruned[:, 5] == 0).all() and pruned.isfinite().all()


# -- what each is better at --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_data_beats_magnitude_and_correction_beats_both(pattern, seed):
    x, weight = calibration(seed=seed), weights(seed=seed + 10)
    hessian = x.T @ x
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        pruned = prune_weight(weight, hessian, method, 0.5, pattern)
        assert (pruned == 0).float().mean() == 0.5
        assert reconstruction_error(weight, pruned, hessian) == pytest.approx(
            float(((x @ (weight - pruned).T) ** 2).sum()), rel=1e-3
        )
        errors[method] = reconstruction_error(weight, pruned, hessian)
        if pattern:
            assert ((pruned.view(24, -1, pattern[1]) != 0).sum(-1) == pattern[0]).all()
    assert errors["wanda"] < 0.7 * errors["magnitude"], errors
    assert errors["sparsegpt"] < 0.9 * errors["wanda"], errors


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_the_blocks_of_sparsegpt_are_bookkeeping(pattern):
    """With the mask decided in groups of a pattern, any block size gives the same weights."""
    x, weight = calibration(), weights()
    whole = sparsegpt(weight, x.T @ x, 0.5, pattern, block=32)
    pieces = sparsegpt(weight, x.T @ x, 0.5, pattern, block=8)
    assert torch.allclose(whole, pieces, atol=1e-5) == (pattern is not None)


# -- through a model ---------------------------------------------------------------------------------------------------
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def test_a_model_is_pruned_layer_by_layer():
    """Each layer sees inputs from pruned layers: the last is pruned by what the pruned ones before it give."""
    model, batches = net(), [calibration(seed=s) for s in range(3)]
    sparsity = prune_one_shot(model, batches, "wanda", 0.5, skip=["4.*"])
    assert sparsity == {"0.weight": 0.5, "2.weight": 0.5} and (model[4].weight != 0).all()
    first = prune_weight(net()[0].weight, sum(x.T @ x for x in batches), "wanda", 0.5)
    assert torch.equal(model[0].weight, first)
    with torch.no_grad():
        inside = [nn.functional.linear(x, first, net()[0].bias).relu() for x in batches]
    second = prune_weight(net()[2].weight, sum(x.T @ x for x in inside), "wanda", 0.5)
    assert torch.allclose(model[2].weight, second) and model.training


def test_methods_rank_on_a_whole_model():
    batches, held = [calibration(seed=s) for s in range(4)], calibration(seed=9)
    off = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = net()
        prune_one_shot(model, batches, method, pattern=(2, 4), skip=["4.*"])
        with torch.no_grad():
            off[method] = float(((model(held) - net()(held)) ** 2).mean())
    assert off["sparsegpt"] < off["wanda"] < off["magnitude"], off


def test_a_transformer_of_hugging_face_and_then_int8():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 50, (4, 16))} for _ in range(3)]
    expected = model(**batches[0]).last_hidden_state
    sparsity = prune_one_shot(model, batches, "sparsegpt", 0.5, skip=["pooler*"])
    assert len(sparsity) == 12 and all(share == pytest.approx(0.5, abs=1e-3) for share in sparsity.values())
    pruned = model(**batches[0]).last_hidden_state
    assert 0 < (pruned - expected).norm() / expected.norm() < 0.2
    assert not any(m._forward_pre_hooks for m in model.modules())
    served = quantize(model, 8, 8, compiled=False)
    code = served.encoder.layer[0].output.dense.weight.qdata
    assert ((model.encoder.layer[0].output.dense.weight == 0) <= (code == 0)).all()
    quick = served(**batches[0]).last_hidden_state
    assert (quick - pruned).norm() / pruned.norm() < 0.02


def test_errors_say_what_is_allowed():
    batches = [torch.randn(8, 32)]
    for wrong, words in (
        ({"method": "random"}, r"method='random' is not allowed; use magnitude \| wanda \| sparsegpt"),
        ({"sparsity": 1.0}, r"sparsity=1.0 is not allowed"),
        ({"pattern": (4, 4)}, r"use \(n, m\) with 0 < n < m"),
        ({"pattern": (3, 5)}, "rows of 32 weights cannot be cut in groups of 5"),
    ):
        with pytest.raises(CannotPrune, match=words):
            prune_one_shot(net(), batches, **wrong)
    with pytest.raises(CannotPrune, match="no calibration batches"):
        prune_one_shot(net(), [])

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(CannotPrune, match=r"idle\.weight were not used"):
        prune_one_shot(Idle(), batches)
