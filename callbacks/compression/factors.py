"""Linear layers of low rank: which rank, which factors, and how to put them into a module and take them out again.

A weight W [out, in] of rank r is second @ first with first [r, in] and second [out, r]: r (in + out) parameters and
multiplications instead of in * out. The best approximation of rank r in the Frobenius norm keeps the r largest singular
values (Eckart and Young 1936); its error is the root of the sum of the squares of those it drops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor, nn

from ... import ShoestringError
from ..parameters.layers import matches

FIRST, SECOND = ".first.weight", ".second.weight"


class NoSuchFactors(ShoestringError):
    """A module cannot take factors of these ranks, or none that small exist."""


# -- ranks and factors -------------------------------------------------------------------------------------------------
def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(first [rank, in], second [out, rank]) with second @ first the best approximation of `weight` [out, in].

    Each gets the root of the singular values, so that both are of one size and train at one rate (arXiv 2103.03936).
    """
    if not 1 <= rank <= min(weight.shape):
        raise NoSuchFactors(f"a weight {list(weight.shape)} has ranks 1 to {min(weight.shape)}, and not {rank}")
    precise = weight if weight.dtype == torch.float64 else weight.float()
    u, s, vh = torch.linalg.svd(precise, full_matrices=False)
    root = s[:rank].sqrt()
    first, second = root[:, None] * vh[:rank], u[:, :rank] * root
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()  # LAPACK's are column-major


def rank_for_energy(singular: Tensor, energy: float) -> int:
    """The smallest rank whose share of the squared `singular` values (descending, [n]) is at least `energy`."""
    kept = singular.double().square().cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(singular))


def _shares(singular: Tensor) -> Tensor:
    squares = singular.double().square()
    return squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)


def saves(shape: Sequence[int], rank: int) -> bool:
    """Whether factors of `rank` have fewer parameters than a weight of `shape` [out, in]."""
    rows, columns = shape
    return rank * (rows + columns) < rows * columns


def ranks_for_energy(layers: Mapping[str, nn.Linear], energy: float) -> dict[str, int]:
    """The ranks that keep `energy` of each of `layers`, by name, where factors of that rank are smaller."""
    ranks = {name: rank_for_energy(singular_values(layer), energy) for name, layer in layers.items()}
    return {name: rank for name, rank in ranks.items() if saves(layers[name].weight.shape, rank)}


def singular_values(layer: nn.Linear) -> Tensor:
    """Return the singular values of the weight, descending, [min(in, out)]."""
    return torch.linalg.svdvals(layer.weight.detach().float())


def ranks_for_budget(
    singular: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], budget: float
) -> dict[str, int]:
    """Ranks that keep at most the share `budget` of all parameters, by weight name; who is not named stays dense.

    Greedy: every weight gets rank 1, then the component with the most energy per parameter comes next. Energy is the
    share of a weight's own squared singular values, or weights with many inputs, which are small, would be left with
    rank 1. A weight whose factors would no longer save anything is dense from there on. Raises `NoSuchFactors` if rank
    1 is too much already.
    """
    step = {name: rows + columns for name, (rows, columns) in shapes.items()}
    dense = {name: rows * columns for name, (rows, columns) in shapes.items()}
    total = sum(dense.values())
    ranks = dict.fromkeys(singular, 1)
    spent = sum(min(step[name], dense[name]) for name in singular)
    if spent > budget * total:
        raise NoSuchFactors(f"budget={budget}: rank 1 everywhere takes {spent / total:.3g} of the parameters already")
    energy = {name: (_shares(values) / step[name]).tolist() for name, values in singular.items()}
    queue = [(-energy[name][1], name) for name in sorted(singular) if step[name] < dense[name]]
    heapify(queue)
    while queue:
        _, name = heappop(queue)
        rank = ranks[name] + 1
        cost = min(dense[name], rank * step[name]) - ranks[name] * step[name]
        if spent + cost > budget * total:
            continue  # this weight has all it gets; a smaller one may still take a component
        spent, ranks[name] = spent + cost, rank
        if rank * step[name] < dense[name]:
            heappush(queue, (-energy[name][rank], name))
    return {name: rank for name, rank in ranks.items() if rank * step[name] < dense[name]}


# -- modules -----------------------------------------------------------------------------------------------------------
class LowRankLinear(nn.Module):
    """x -> second(first(x)): a linear layer of rank r in two, [..., in] -> [..., r] -> [..., out].

    Both are plain `nn.Linear`, which others prune and quantize like any. `weight` is their product, made when asked
    for: for code that reads the weight of a layer instead of calling it.
    """

    def __init__(self, first: Tensor, second: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        (rank, self.in_features), (self.out_features, _) = first.shape, second.shape
        # on "meta" nothing is initialised only to be replaced, and nothing is drawn
        self.first = nn.Linear(self.in_features, rank, bias=False, device="meta")
        self.second = nn.Linear(rank, self.out_features, bias=False, device="meta")
        self.first.weight, self.second.weight = nn.Parameter(first), nn.Parameter(second)
        self.second.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        return self.second.weight @ self.first.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def factorable(module: nn.Module, skip: Sequence[str] = (), *, frozen: bool = False) -> dict[str, nn.Linear]:
    """The linear layers of `module` by name that factors can replace, but for those that match a pattern in `skip`.

    Left as they are: subclasses (their forward is their own), weights that are frozen (unless `frozen`) or used in
    several places, layers with hooks, and the two halves of a layer that is factored already.
    """
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    halves = {id(half) for m in module.modules() if isinstance(m, LowRankLinear) for half in m.children()}
    return {
        name: layer
        for name, layer in module.named_modules()
        if name
        and type(layer) is nn.Linear
        and id(layer) not in halves
        and (weight := layer._parameters.get("weight")) is not None
        and (frozen or weight.requires_grad)
        and uses[id(weight)] == 1
        and not any(getattr(layer, hooks) for hooks in vars(layer) if hooks.endswith("_hooks"))
        and not matches((name, f"{name}.weight"), skip)
    }


def apply_low_rank(module: nn.Module, ranks: Mapping[str, int]) -> dict[str, nn.Linear]:
    """Replace the linear layers named in `ranks` by factors of their weights; returns the layers that were replaced.

    To load factors from a file: `apply_low_rank(module, ranks_in(module, state))`, then `load_state_dict(state)`.
    """
    replaced = {}
    for name, rank in ranks.items():
        layer = module.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise NoSuchFactors(f"{name} is a {type(layer).__name__}; only a Linear can be replaced by factors")
        factors = svd_factors(layer.weight.detach(), rank)
        module.set_submodule(name, LowRankLinear(*factors, layer.bias).train(layer.training))
        replaced[name] = layer
    return replaced


def merge_(module: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Undo `apply_low_rank`: `layers` return to their places with the product of their factors as weight."""
    for name, layer in layers.items():
        factors = module.get_submodule(name)
        assert isinstance(factors, LowRankLinear)
        layer.weight.data = factors.weight.detach()
        module.set_submodule(name, layer.train(factors.training))


def ranks_in(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of every linear layer of `module` that `state` (a state dict) has in factors."""
    return {
        name: state[name + FIRST].shape[0]
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name + FIRST in state and name + SECOND in state
    }


def merged_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` for a `module` of plain linear layers: products instead of factors, all else as it is."""
    merged = dict(state)
    for name in ranks_in(module, state):
        merged[f"{name}.weight"] = merged.pop(name + SECOND) @ merged.pop(name + FIRST)
        if (bias := merged.pop(f"{name}.second.bias", None)) is not None:
            merged[f"{name}.bias"] = bias
    return merged
