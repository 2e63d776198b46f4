"""A trained model's linear layers as products of two low-rank ones, at the rank that keeps a share of their energy."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from ...callbacks.compression.factors import LowRankLinear, apply_low_rank, factorable, ranks_for_energy


def factorized(model: nn.Module, energy: float) -> nn.Module:
    """A copy of `model` in which every linear layer is cut to the rank that keeps `energy`, where that is smaller.

    Layers whose weight another layer shares (a tied embedding) stay whole.
    """
    model = copy.deepcopy(model)
    apply_low_rank(model, ranks_for_energy(factorable(model, frozen=True), energy))
    return model.eval()


def ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every layer that has been factorized, by name: what `shaped` needs."""
    return {n: m.first.out_features for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def shaped(model: nn.Module, wanted: Mapping[str, int]) -> nn.Module:
    """A copy of `model` whose layers `wanted` have the shape of these ranks; their weights are to be loaded."""
    model = copy.deepcopy(model)
    for name, rank in wanted.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        first = layer.weight.new_empty(rank, layer.in_features)
        second = layer.weight.new_empty(layer.out_features, rank)
        model.set_submodule(name, LowRankLinear(first, second, layer.bias))
    return model
