"""What our own optimizers compute, by hand or beside the algorithm of their paper."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shoestring.callbacks.optimization.averaged_point import averaged_point
from shoestring.trainer.tasks.optimizers.adamw8bit import AdamW4bit, AdamW8bit, decode, encode
from shoestring.trainer.tasks.optimizers.lion import Lion
from shoestring.trainer.tasks.optimizers.make import build_optimizer
from shoestring.trainer.tasks.optimizers.muon import orthogonal
from shoestring.trainer.tasks.optimizers.schedule_free import ScheduleFreeAdamW
from shoestring.trainer.tasks.optimizers.stepping import CannotStep


def stepped(optimizer: torch.optim.Optimizer, weight: nn.Parameter, *gradients: torch.Tensor) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def gradients(count: int, *shape: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draw) for _ in range(count)]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_torchs_optimizers_are_fused_and_leave_the_loss_scale_to_whoever_clips(name: str) -> None:
    def build(dtype: torch.dtype) -> torch.optim.Optimizer:
        settings = SimpleNamespace(name=name, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, momentum=0.9)
        return build_optimizer([("w", nn.Parameter(torch.ones(3, 3, dtype=dtype)))], settings)

    fused = build(torch.float32)
    assert all(group["fused"] for group in fused.param_groups)
    assert not fused._step_supports_amp_scaling
    plain = type(fused)([nn.Parameter(torch.ones(3, 3))], lr=0.1, weight_decay=0.1, **_own(fused))
    ours, theirs = (o.param_groups[0]["params"][0] for o in (fused, plain))
    for optimizer, weight in ((fused, ours), (plain, theirs)):
        stepped(optimizer, weight, *gradients(5, 3, 3))
    assert torch.allclose(ours, theirs, atol=1e-7)


def _own(optimizer: torch.optim.Optimizer) -> dict:
    return {key: optimizer.defaults[key] for key in ("betas", "eps", "momentum") if key in optimizer.defaults}


def test_lion_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    assert stepped(optimizer, weight, torch.tensor([2.0, -0.5, 0.0])).tolist() == pytest.approx([0.85, 1.05, 0.0])
    assert optimizer.state[weight]["exp_avg"].tolist() == [1.0, -0.25, 0.0]
    # 0.9 x 1 + 0.1 x -10 is below 0: the kept average decides together with the gradient
    assert stepped(optimizer, weight, torch.tensor([-10.0, 0.0, 0.0])).tolist() == pytest.approx([0.9075, 1.0975, 0.0])


def test_schedule_free_follows_its_algorithm() -> None:
    """x, y and z as the paper writes them; the optimizer keeps y and z, from which x comes back."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    rates, share, decay, pull = [0.1, 0.2, 0.2, 0.05], 0.9, 0.99, 0.1
    optimizer = ScheduleFreeAdamW([weight], betas=(share, decay), weight_decay=pull)
    x = z = y = weight.detach().clone()
    moment, weights, largest = torch.zeros_like(x), 0.0, 0.0
    for step, (rate, gradient) in enumerate(zip(rates, gradients(4, 2), strict=True), start=1):
        gradient = gradient.double()
        optimizer.param_groups[0]["lr"] = rate
        assert torch.allclose(stepped(optimizer, weight, gradient), weight.detach())
        moment = decay * moment + (1 - decay) * gradient.square()
        z = z - rate * (gradient / ((moment / (1 - decay**step)).sqrt() + 1e-8) + pull * y)
        largest = max(largest, rate)
        weights += largest**2
        x = x + largest**2 / weights * (z - x)
        y = (1 - share) * z + share * x
        assert torch.allclose(weight, y) and torch.allclose(optimizer.state[weight]["z"], z)
        assert torch.allclose(averaged_point(weight.detach(), optimizer.state[weight]["z"], share), x)
    assert not torch.allclose(x, y)
    with pytest.raises(CannotStep, match="a first one above 0"):
        ScheduleFreeAdamW([weight], betas=(0.0, 0.9))


@pytest.mark.parametrize("signed", [True, False])
def test_bytes_keep_values_to_a_hundredth_zeros_and_the_largest(signed: bool) -> None:
    values = torch.cat([gradients(1, 1000)[0], torch.tensor([1e-20, 0.0, 3.0])])
    values = values if signed else values.abs()
    values[:256] = 0.0
    codes, scales = torch.empty(len(values), dtype=torch.uint8), torch.empty(4)
    encode(values, codes, scales, signed=signed)
    back = decode(codes, scales, signed=signed)
    assert torch.equal(codes == 0, values == 0) and torch.equal(back == 0, values == 0)
    assert torch.equal(back.sign(), values.sign())
    error = (back - values).abs()
    assert error.mean() < (0.012 if signed else 0.006) * values.abs().mean()
    assert error.max() <= 0.01 * values.abs().max()
    again, same = torch.empty_like(codes), torch.empty_like(scales)
    encode(back, again, same, signed=signed)
    assert (again == codes).float().mean() > 0.99


def test_adamw_in_bytes_goes_where_adamw_goes() -> None:
    """Steps of one length: the paths part by rounding alone. A chunk, part of one, and a block not full."""
    ends = {}
    for cls in (torch.optim.AdamW, AdamW8bit, AdamW4bit):
        weight = nn.Parameter(torch.ones(1025, 1027))
        optimizer = cls([weight], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
        ends[cls] = stepped(optimizer, weight, *(g + 0.5 for g in gradients(4, 1025, 1027)))
    moved = (ends[torch.optim.AdamW] - 1).abs().mean()
    for cls, share in ((AdamW8bit, 0.05), (AdamW4bit, 0.3)):
        apart = (ends[torch.optim.AdamW] - ends[cls]).abs()
        assert apart.mean() < share * moved and apart.max() < 4 * 0.01


def test_bytes_survive_a_state_dict_and_small_parameters_have_none() -> None:
    def fresh() -> tuple[nn.Linear, AdamW8bit]:
        torch.manual_seed(0)
        layer = nn.Linear(64, 64)
        return layer, AdamW8bit(layer.parameters())

    layer, optimizer = fresh()
    for weight in layer.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    other, restored = fresh()
    restored.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert optimizer.state[mine].keys() == restored.state[theirs].keys()
        for key, value in optimizer.state[mine].items():
            loaded = torch.as_tensor(restored.state[theirs][key])
            assert torch.equal(torch.as_tensor(value), loaded) and torch.as_tensor(value).dtype == loaded.dtype
    assert restored.state[other.weight]["exp_avg"].dtype == torch.uint8
    assert restored.state[other.bias]["exp_avg"].dtype == torch.float32


def beside_torchs(name: str, reference: type[torch.optim.Optimizer], **own: object) -> float:
    """How far apart ours and torch's are after five steps, as a share of how far they went."""
    settings = SimpleNamespace(name=name, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, momentum=0.9)
    weights = [gradients(1, 33, 65)[0], gradients(1, 40, 12)[0]]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    optimizers = build_optimizer([(f"w{i}", p) for i, p in enumerate(ours)], settings), reference(theirs, **own)
    for step in range(5):
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            for p in parameters:
                p.grad = gradients(5, *p.shape)[step] * (1 + step)
            optimizer.step()
    apart = max(float((a - b).detach().norm()) for a, b in zip(ours, theirs, strict=True))
    return apart / max(float((a - b).detach().norm()) for a, b in zip(ours, weights, strict=True))


def test_adafactor_is_torchs() -> None:
    assert beside_torchs("adafactor", torch.optim.Adafactor, lr=0.01, weight_decay=0.1) < 1e-5


def test_muon_is_torchs_which_computes_in_bfloat16() -> None:
    own = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    assert beside_torchs("muon", torch.optim.Muon, **own) < 0.02
    matrix = gradients(1, 24, 60)[0]
    for each in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonal(each))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
        assert orthogonal(each).shape == each.shape


def test_what_is_not_whole_is_refused() -> None:
    for name in ("muon", "adafactor"):
        settings = SimpleNamespace(name=name, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, momentum=0.9)
        optimizer = build_optimizer([("w", nn.Parameter(torch.ones(3, 4)))], settings)
        flat = nn.Parameter(torch.ones(12))
        flat.grad = torch.ones(12)
        optimizer.param_groups[0]["params"] = [flat]
        with pytest.raises(CannotStep, match="needs whole matrices, and the strategy gives it flat shards"):
            optimizer.step()
