"""Parameters in other layouts than torch's plain one, and of no dimension."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoestring.callbacks.parameters.shards import NoShard, Shards
from shoestring.trainer.run.same_start import CannotShard, check_dimensions


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)


def test_slices_of_channels_last_weights_are_views_in_plain_order():
    module = convolutions()
    module[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(module[0].parameters())
    x = torch.randn(2, 3, 8, 8)
    before = module(x)
    before.sum().backward()
    optimizer.step()  # states take the layout that the weights have now
    whole = module[0].weight.detach().clone()
    shards = Shards(module, [optimizer])
    assert torch.equal(shards.whole("0.weight"), whole)
    assert torch.equal(shards.master("0.weight"), whole.reshape(-1))
    shards.master("0.weight")[1] = 7.0
    assert module[0].weight[0, 0, 0, 1] == 7.0
    assert shards.gradient("0.weight").shape == (4 * 3 * 9,)
    shards.state("0.weight")["exp_avg"][1] = 5.0
    assert optimizer.state[module[0].weight]["exp_avg"][0, 0, 0, 1] == 5.0
    assert shards.frozen()["1.weight"][1].tolist() == module[1].weight.flatten().tolist()
    optimizer.step()


def test_a_transposed_view_of_another_parameter_is_refused_by_name():
    module = nn.Module()
    module.table = nn.Parameter(torch.randn(3, 4))
    module.head = nn.Parameter(module.table.data.t())
    with pytest.raises(NoShard, match=r"parameter head is a view of table with strides \(1, 4\)"):
        Shards(module, [])


def test_zero_refuses_a_parameter_without_dimensions_by_name():
    module = nn.Module()
    module.inner = nn.Module()
    module.inner.scale = nn.Parameter(torch.ones(1))
    check_dimensions(module, "ZeRO")
    module.inner.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(CannotShard, match=r"parameter inner\.temperature is a number without dimensions"):
        check_dimensions(module, "ZeRO")
