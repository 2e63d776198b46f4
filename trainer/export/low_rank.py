"""Linear layers as products of two thin ones, by truncated SVD (Eckart-Young): the best there is at a rank."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .trained import CannotExport


class LowRankLinear(nn.Module):
    """`up @ (down @ x) + bias`, in place of a linear layer: rank * (in + out) weights for in * out."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def rank_for(singular: Tensor, energy: float) -> int:
    """The smallest rank whose singular values (descending, [R]) hold the share `energy` of the sum of squares."""
    held = singular.double().square().cumsum(0)
    return int(torch.searchsorted(held, energy * held[-1] * (1 - 1e-12))) + 1


def factorized(model: nn.Module, energy: float) -> nn.Module:
    """A copy of `model` in which every linear layer is cut to the rank that keeps `energy`, where that is smaller.

    Layers whose weight another layer shares (a tied embedding) stay whole.
    """
    return _cut(model, spectra(model), energy)


class Truncation:
    """`factorized` at several energies of one model, whose singular values are computed but once.

    Raises `CannotExport` where no layer would be smaller.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None

    def __call__(self, model: nn.Module, *, energy: float) -> nn.Module:
        if self._model is not model:
            self._model, self._spectra = model, spectra(model)
        thin = _cut(model, self._spectra, energy)
        if not ranks(thin):
            raise CannotExport(f"no layer is smaller at the rank that keeps {energy:.6g} of its energy")
        return thin


def spectra(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The singular value decomposition of every linear layer that shares its weight with none, by name."""
    return {
        name: torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
        for name, layer in _linears(model).items()
    }


def _cut(model: nn.Module, found: Mapping[str, tuple[Tensor, Tensor, Tensor]], energy: float) -> nn.Module:
    model = copy.deepcopy(model)
    for name, (left, singular, right) in found.items():
        layer: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        rank = rank_for(singular, energy)
        if rank * (layer.in_features + layer.out_features) >= layer.weight.numel():
            continue
        root = singular[:rank].sqrt()
        thin = _thin(layer, rank)
        with torch.no_grad():
            thin.up.weight.copy_(left[:, :rank] * root)
            thin.down.weight.copy_(root[:, None] * right[:rank])
            if layer.bias is not None:
                thin.up.bias.copy_(layer.bias)
        model.set_submodule(name, thin)
    return model.eval()


def ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every layer that has been factorized, by name: what `shaped` needs."""
    return {n: m.down.out_features for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def shaped(model: nn.Module, wanted: Mapping[str, int]) -> nn.Module:
    """A copy of `model` whose layers `wanted` have the shape of these ranks; their weights are to be loaded."""
    model = copy.deepcopy(model)
    for name, rank in wanted.items():
        model.set_submodule(name, _thin(model.get_submodule(name), rank))  # type: ignore[arg-type]
    return model


def _thin(layer: nn.Linear, rank: int) -> LowRankLinear:
    thin = LowRankLinear(layer.in_features, layer.out_features, rank, layer.bias is not None)
    return thin.to(layer.weight.device, layer.weight.dtype)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    owners: dict[int, int] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and owners[id(m.weight)] == 1}
