"""Layers that see something else instead of their weights, and nobody else does."""

import pytest
import torch
from torch import nn

from shoestring.callbacks.forward.forward_weights import ForwardWeights, NeverUsed


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_the_layer_sees_the_function_and_the_parameter_gets_the_gradient():
    model, x = net(), torch.randn(3, 4)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    shown = ForwardWeights(model, ["0.weight"], lambda name, weight: weight * mask)
    out = model(x)
    hidden = nn.functional.linear(x, model[0].weight * mask, model[0].bias).relu()
    assert torch.equal(out, nn.functional.linear(hidden, model[2].weight, model[2].bias))
    out.sum().backward()
    assert model[0].weight.grad[:, 1].abs().max() == 0 and model[0].weight.grad[:, 0].abs().max() > 0
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert isinstance(model[0].weight, nn.Parameter), "between forwards the parameter is itself"
    shown.remove()
    assert torch.equal(model(x), net()(x))


def test_several_apply_in_the_order_installed():
    model = nn.Linear(1, 1, bias=False)
    weight = float(model.weight.detach())
    ForwardWeights(model, ["weight"], lambda name, w: w + 1)
    ForwardWeights(model, ["weight"], lambda name, w: w * 10)
    assert model(torch.ones(1)).item() == pytest.approx((weight + 1) * 10)
    assert "weight" not in vars(model)


def test_a_crash_in_forward_leaves_the_parameter_visible():
    model = net()
    ForwardWeights(model, ["0.weight"], lambda name, w: w * 2)
    with pytest.raises(RuntimeError):
        model(torch.ones(3, 5))
    assert isinstance(model[0].weight, nn.Parameter)


def test_a_shared_weight_is_replaced_everywhere():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ForwardWeights(model, ["0.weight"], lambda name, w: torch.zeros_like(w))
    assert model(torch.ones(1, 3)).abs().max() == 0


def test_a_layer_that_never_runs_is_named():
    attention = nn.MultiheadAttention(4, 1)
    shown = ForwardWeights(attention, ["out_proj.weight"], lambda name, w: w * 0)
    x = torch.ones(2, 1, 4)
    attention(x, x, x)
    with pytest.raises(NeverUsed, match=r"out_proj\.weight"):
        shown.check_used("n_m")
