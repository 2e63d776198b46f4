"""Which weights techniques act on: those of linear and convolution layers, by name, with the layers that own them.

Embeddings, norms and biases are left alone everywhere, and a weight tied to an embedding is an embedding. A weight that
several layers share is named once, as `named_parameters` names it, and a pattern leaves it out under any of its names.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ... import IncompatibleTechniques
from ...spelling import most_similar

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether one of `names` matches one of `patterns`, such as `head.*`."""
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def check_skip(module: nn.Module, skip: Sequence[str], technique: str, *, layers: bool = False) -> None:
    """Raise `IncompatibleTechniques` where a pattern of `skip` matches no parameter: it is spelled otherwise.

    layers: the name of a layer will do, without that of its weight.
    """
    if isinstance(skip, str):
        raise IncompatibleTechniques(f"{technique}: skip={skip!r} is one text; write a list of patterns: [{skip!r}]")
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known = names | {name.removesuffix(".weight") for name in names if layers}
    for pattern in skip:
        if not fnmatch.filter(known, pattern):
            near = most_similar(pattern, names)
            hint = f" Nearest: {near}." if near else ""
            raise IncompatibleTechniques(
                f"{technique}: skip={pattern!r} matches no parameter of {type(module).__name__}.{hint}"
            )


def owners(module: nn.Module, skip: Sequence[str] = ()) -> dict[str, list[nn.Module]]:
    """The linear and convolution layers by the name of their weight, frozen or not, but for what `skip` matches."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    by_weight: dict[int, list[nn.Module]] = {}
    aliases: dict[int, list[str]] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        weight = layer._parameters.get("weight") if isinstance(layer, KINDS) else None
        if weight is None or id(weight) in embeddings or not weight.is_floating_point():  # codes are no weights
            continue
        aliases.setdefault(id(weight), []).append(f"{prefix}.weight" if prefix else "weight")
        if all(known is not layer for known in by_weight.setdefault(id(weight), [])):
            by_weight[id(weight)].append(layer)
    kept = {weight for weight, names in aliases.items() if not matches(names, skip)}
    return {name: by_weight[id(p)] for name, p in module.named_parameters() if id(p) in kept}


def trained_weights(module: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """Names of the weights of linear and convolution layers that are trained: what is pruned and clustered."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return [name for name in owners(module, skip) if name not in frozen]


@dataclass(frozen=True)
class Layer:
    """A layer to quantize; `adapter` is the PEFT layer that wraps it, if one does."""

    module: nn.Module
    adapter: Any = None


def quantizable(module: nn.Module, skip: Sequence[str] = ()) -> dict[str, list[Layer]]:
    """The layers by the name of their weight, frozen weights too.

    Left out: the low-rank matrices of PEFT adapters, which are small and are merged or kept in full precision; and
    PEFT's unused originals of layers that are trained as a copy.
    """
    apart, wrapped = _adapters(module)
    by_name = {
        name: [Layer(layer, wrapped.get(id(layer))) for layer in layers if id(layer) not in apart]
        for name, layers in owners(module, skip).items()
    }
    return {name: layers for name, layers in by_name.items() if layers}


def _adapters(module: nn.Module) -> tuple[set[int], dict[int, Any]]:
    """Ids of modules that belong to adapters only; and id of a wrapped layer -> the PEFT layer around it."""
    apart: set[int] = set()
    wrapped: dict[int, Any] = {}
    for layer in module.modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, nn.Module) and hasattr(layer, "lora_A"):
            wrapped[id(base)] = layer
            inside = {id(m) for m in base.modules()}
            apart |= {id(m) for m in layer.modules() if m is not layer and id(m) not in inside}
        unused = getattr(layer, "original_module", None)
        if isinstance(unused, nn.Module) and hasattr(layer, "modules_to_save"):
            apart |= {id(m) for m in unused.modules()}
    return apart, wrapped
