"""SOAP, GaLore and APOLLO beside the algorithms of their papers, and AdamW in half bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shoestring.trainer.tasks.optimizers import low_rank, soap
from shoestring.trainer.tasks.optimizers.adamw8bit import AdamW4bit, decode, encode
from shoestring.trainer.tasks.optimizers.make import build_optimizer

RATE, KEEP, SQUARE, EPS, DECAY = 0.01, 0.9, 0.99, 1e-8, 0.1
SHAPES = [(6, 9), (9, 6)]


def drawn(count: int, *shape: int, seed: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(count)]


def course(name: str, gradients: list[Tensor]) -> list[Tensor]:
    """The weights after each step from zero, which decay leaves alone until they are something."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    own = SimpleNamespace(name=name, lr=RATE, weight_decay=DECAY, betas=(KEEP, SQUARE), eps=EPS, momentum=0.0)
    optimizer, seen = build_optimizer([("inner", weight)], own), []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        seen.append(weight.detach().clone())
    return seen


def adam(kept: dict[str, Tensor | float], values: Tensor, step: int) -> Tensor:
    kept["m"] = KEEP * kept.get("m", 0.0) + (1 - KEEP) * values
    kept["v"] = SQUARE * kept.get("v", 0.0) + (1 - SQUARE) * values**2
    return kept["m"] / (1 - KEEP**step) / ((kept["v"] / (1 - SQUARE**step)).sqrt() + EPS)


def test_soap_is_adam_in_the_eigenbasis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 3: turn gradient and momentum, step, turn back; algorithm 4 every few steps.

    Of a square matrix: where a gradient has no full rank, the rest of its eigenvectors are anybody's.
    """
    shape = (7, 7)
    monkeypatch.setattr(soap, "EVERY", 3)
    gradients = drawn(8, *shape)
    first, *others = gradients
    left, right = (1 - SQUARE) * first @ first.T, (1 - SQUARE) * first.T @ first
    of_left, of_right = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
    weight, mean, moment = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    expected = [weight]
    for step, gradient in enumerate(others, start=1):
        mean = KEEP * mean + (1 - KEEP) * gradient
        moment = SQUARE * moment + (1 - SQUARE) * (of_left.T @ gradient @ of_right) ** 2
        turned = of_left.T @ mean @ of_right / (1 - KEEP**step)
        move = of_left @ (turned / ((moment / (1 - SQUARE**step)).sqrt() + EPS)) @ of_right.T
        weight = weight * (1 - RATE * DECAY) - RATE * move
        left = SQUARE * left + (1 - SQUARE) * gradient @ gradient.T
        right = SQUARE * right + (1 - SQUARE) * gradient.T @ gradient
        if step % 3 == 0:
            of_left, of_right = torch.linalg.qr(left @ of_left)[0], torch.linalg.qr(right @ of_right)[0]
        expected.append(weight)
    for ours, theirs in zip(course("soap", gradients), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)
    monkeypatch.setattr(soap.SOAP, "largest_side", 1)
    plain = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    reference = torch.optim.AdamW([plain], lr=RATE, betas=(KEEP, SQUARE), eps=EPS, weight_decay=DECAY)
    for gradient in others:
        plain.grad = gradient
        reference.step()
    assert torch.allclose(course("soap", gradients)[-1], plain.detach(), atol=1e-9), "nothing turned is AdamW"
    assert not torch.allclose(plain.detach(), expected[-1], atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_is_adam_in_the_first_singular_vectors(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithms 1 and 2: of the shorter side, with moments that a new basis keeps. Rank 3 of 6."""
    monkeypatch.setattr(low_rank, "EVERY", 3)
    monkeypatch.setattr(low_rank.GaLore, "share", 2)
    gradients, kept = drawn(7, *shape), {}
    weight, expected = torch.zeros(shape, dtype=torch.float64), []
    for step, gradient in enumerate(gradients, start=1):
        wide = gradient if shape[0] < shape[1] else gradient.T
        if step % 3 == 1:
            basis = torch.linalg.svd(wide.float())[0][:, :3].double()
        move = 0.25 * basis @ adam(kept, basis.T @ wide, step)
        weight = weight * (1 - RATE * DECAY) - RATE * (move if shape[0] < shape[1] else move.T)
        expected.append(weight)
    for ours, theirs in zip(course("galore", gradients), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_scales_channels(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 1, and its limit: one gradient is ten times the others, and its step is no longer than 1.01 times."""
    monkeypatch.setattr(low_rank, "EVERY", 3)
    gradients, kept, last = drawn(7, *shape), {}, 0.0
    weight, expected, limited = torch.zeros(shape, dtype=torch.float64), [], 0
    for step, gradient in enumerate(gradients, start=1):
        gradient.mul_(10 if step == 4 else 1)
        wide = gradient if shape[0] < shape[1] else gradient.T
        draw = torch.Generator().manual_seed((step - 1) // 3)
        low = (torch.randn(1, 6, generator=draw) / 1**0.5).double() @ wide
        scaled = wide * (adam(kept, low, step).norm(dim=0) / low.norm(dim=0))
        if last and scaled.norm() > 1.01 * last:
            scaled, limited = scaled * 1.01 * last / scaled.norm(), limited + 1
        last = float(scaled.norm())
        weight = weight * (1 - RATE * DECAY) - RATE * (scaled if shape[0] < shape[1] else scaled.T)
        expected.append(weight)
    assert limited
    for ours, theirs in zip(course("apollo", gradients), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("signed", [True, False])
def test_half_bytes_are_the_sixteen_values_of_the_paper(signed: bool) -> None:
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
    values = torch.tensor([*positive, 0.0, *([-value for value in positive[:-1]] if signed else [])] * 8)
    if signed:
        codes, scales = torch.empty(128, dtype=torch.uint8), torch.empty(1)
        encode(values, codes, scales, signed=signed, bits=4)
        assert torch.allclose(decode(codes, scales, signed=signed, bits=4), values)
        assert codes.unique().tolist() == list(range(16)) and torch.equal(codes == 0, values == 0)
        return
    roots = torch.cat([torch.linspace(1e-6, 1, 300), torch.zeros(10)])
    codes, scales = torch.empty(310, dtype=torch.uint8), torch.empty(3)
    encode(roots, codes, scales, signed=signed, bits=4)
    back = decode(codes, scales, signed=signed, bits=4)
    assert int(codes.max()) == 15 and torch.equal(codes == 0, roots == 0), "no step divides by nothing"
    assert float((back - roots).abs().max()) < 0.07


def test_a_byte_of_zero_is_two_moments_of_zero() -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW4bit([weight], lr=0.1)
    for seed in range(2):
        weight.grad = drawn(1, 64, 64, seed=seed)[0].float()
        weight.grad[:32] = 0.0
        optimizer.step()
    assert torch.equal(weight[:32], torch.ones(32, 64)) and not optimizer.state[weight]["moments"][:32].any()
    assert bool(optimizer.state[weight]["moments"][32:].all())
    optimizer.state[weight]["moments"].zero_()
    before = weight.detach().clone()
    weight.grad.zero_()
    optimizer.step()
    assert torch.equal(weight, before)
