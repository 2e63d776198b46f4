"""Grids of few levels: computed by hand, and their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.callbacks.compression.fake_quantization import (
    BadGroups,
    codes,
    fake_quantize_tokens,
    fake_quantize_weight,
    first_steps,
    learned_step,
    quantized,
    scales,
    values,
)


def test_three_bits_by_hand():
    """Q = 3: rows are divided by absmax / 3 and rounded to -3 … 3."""
    weight = torch.tensor([[3.0, -1.4, 0.6, 0.0], [-0.3, 0.1, 0.04, 0.06]])
    steps = scales(weight, 3)
    assert steps.flatten().tolist() == pytest.approx([1.0, 0.1])
    assert codes(weight, steps, 3).tolist() == [[3, -1, 1, 0], [-3, 1, 0, 1]]
    expected = torch.tensor([[3.0, -1.0, 1.0, 0.0], [-0.3, 0.1, 0.0, 0.1]])
    assert torch.allclose(fake_quantize_weight(weight, 3), expected)


def test_groups_have_steps_of_their_own():
    weight = torch.tensor([[1.0, 0.4, 10.0, 4.0]])
    assert quantized(weight, 2).tolist() == [[0.0, 0.0, 10.0, 0.0]]
    assert quantized(weight, 2, group_size=2).tolist() == [[1.0, 0.0, 10.0, 0.0]]
    assert scales(weight, 2, 2).shape == (1, 2, 1)
    with pytest.raises(BadGroups, match=r"4 inputs a row.*groups of 3 do not divide"):
        quantized(weight, 2, group_size=3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 40), st.sampled_from(["float32", "bfloat16"]))
def test_what_a_token_becomes_does_not_depend_on_the_others(seed, rows, features, dtype):
    """Bit for bit, however a batch is split among ranks and whatever the CPU's vectors are."""
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, features, generator=draw) * 10 ** torch.randn(rows, 1, generator=draw)).to(
        getattr(torch, dtype)
    )
    alone = torch.cat([fake_quantize_tokens(row[None]) for row in x])
    assert torch.equal(fake_quantize_tokens(x), alone)


def test_a_convolution_has_a_step_for_every_output_channel():
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 2, 2)
    flat = quantized(weight.view(5, 12), 4)
    assert torch.equal(quantized(weight, 4), flat.view(5, 3, 2, 2))


def test_ternary_steps_of_least_error_by_hand():
    """[1, 1, 1, 1, 4] at 2 bits: the whole range keeps only the 4, error 4; levels of 8/5 keep all of them, error
    4 * 0.6^2 + 2.4^2 = 7.2; so the range stays. [1, 1, 1, 1, 1.5]: one level of 1.1 is better than 1.5 for all."""
    assert quantized(torch.tensor([[1.0, 1, 1, 1, 4]]), 2, rule="mse").tolist() == [[0, 0, 0, 0, 4]]
    assert torch.allclose(quantized(torch.tensor([[1.0, 1, 1, 1, 1.5]]), 2, rule="mse"), torch.full((1, 5), 1.1))


@given(st.integers(2, 8), st.integers(0, 100), st.sampled_from([None, 8]))
def test_what_every_grid_keeps(bits, seed, group_size):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=draw)
    weight[torch.rand(6, 32, generator=draw) < 0.5] = 0
    weight[3] = 0
    for rule in ("absmax", "mse"):
        steps = scales(weight, bits, group_size, rule)
        code = codes(weight, steps, bits)
        shown = values(code, steps)
        assert code.abs().max() <= 2 ** (bits - 1) - 1
        assert (shown[weight == 0] == 0).all(), "zeros stay zero"
        assert torch.equal(shown, quantized(weight, bits, group_size, rule))
        assert (shown * weight >= 0).all() and shown.isfinite().all()
        assert torch.allclose(quantized(shown, bits, group_size), shown, atol=1e-5) or rule == "mse"
    worst = (weight - quantized(weight, bits, group_size)).abs().view(6, steps.shape[1], -1)
    assert (worst <= scales(weight, bits, group_size) * 0.5001).all()
    error = [((weight - quantized(weight, bits, group_size, rule)) ** 2).sum() for rule in ("absmax", "mse")]
    assert error[1] <= error[0] * 1.0001


def test_the_gradient_goes_straight_through():
    weight = torch.randn(3, 4, requires_grad=True)
    pull = torch.randn(3, 4)
    (fake_quantize_weight(weight, 4) * pull).sum().backward()
    assert torch.equal(weight.grad, pull)
    x = torch.randn(2, 5, 4, requires_grad=True)
    (fake_quantize_tokens(x) * 2).sum().backward()
    assert (x.grad == 2).all()


def test_tokens_by_hand():
    """127.5 levels to the largest value; the highest positive one is cut to 127."""
    x = torch.tensor([[127.5, -1.2, 0.4], [-1.275, 0.0, 0.614]])
    assert torch.allclose(fake_quantize_tokens(x), torch.tensor([[127.0, -1.0, 0.0], [-1.28, 0.0, 0.61]]), atol=1e-5)
    assert (fake_quantize_tokens(torch.zeros(2, 3)) == 0).all()


def test_half_precision_keeps_its_type():
    weight = torch.randn(4, 16, dtype=torch.bfloat16)
    assert fake_quantize_weight(weight, 8).dtype == fake_quantize_tokens(weight).dtype == torch.bfloat16
    assert (fake_quantize_weight(weight, 8) - weight).abs().max() < 0.05


def test_learned_steps_by_hand():
    """3 bits, s = 1: inside, round(w/s) - w/s; outside, -Q or Q; times 1/sqrt(4 * 3)."""
    weight = torch.tensor([[0.3, 1.4, -5.0, 4.0]], requires_grad=True)
    steps = torch.ones(1, 1, 1, requires_grad=True)
    shown = learned_step(weight, steps, 3)
    assert shown.tolist() == [[0.0, 1.0, -3.0, 3.0]]
    (shown * torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert weight.grad.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    expected = (1 * -0.3 + 10 * -0.4 + 100 * -3 + 1000 * 3) / 12**0.5
    assert steps.grad.item() == pytest.approx(expected, rel=1e-6)
    assert first_steps(torch.tensor([[1.0, -3.0]]), 3).item() == pytest.approx(2 * 2 / 3**0.5)


def test_learned_steps_lower_the_error_they_are_trained_on():
    """Descending on |W x - Q(W) x|^2 from LSQ's start ends below the error of the whole range."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 64), torch.randn(256, 64)
    steps = first_steps(weight, 2).requires_grad_()
    descend = torch.optim.Adam([steps], lr=0.02)

    def error(shown):
        return ((x @ (weight - shown).T) ** 2).mean()

    for _ in range(200):
        descend.zero_grad()
        error(learned_step(weight, steps, 2)).backward()
        descend.step()
    assert error(learned_step(weight, steps, 2)) < 0.4 * error(quantized(weight, 2))
