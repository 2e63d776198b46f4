"""Which layers are quantized: linear and convolution layers that own their weight, adapters and unused copies apart."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A layer to quantize; `adapter` is the PEFT layer that wraps it, if one does."""

    module: nn.Module
    adapter: Any = None


def quantizable(module: nn.Module, skip: Sequence[str] = ()) -> dict[str, list[Layer]]:
    """The layers by the name of their weight, as `named_parameters` gives it; frozen weights too.

    Left out: what matches a pattern in `skip` under any of its names; weights tied to an embedding; the low-rank
    matrices of PEFT adapters, which are small and are merged or kept in full precision; and PEFT's unused originals of
    layers that are trained as a copy.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    apart, wrapped = _adapters(module)
    found: dict[int, list[Layer]] = {}
    aliases: dict[int, list[str]] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        weight = layer._parameters.get("weight") if isinstance(layer, KINDS) else None
        if weight is None or id(weight) in embeddings or id(layer) in apart:
            continue
        aliases.setdefault(id(weight), []).append(f"{prefix}.weight" if prefix else "weight")
        if all(known.module is not layer for known in found.setdefault(id(weight), [])):
            found[id(weight)].append(Layer(layer, wrapped.get(id(layer))))
    for weight_id, names in aliases.items():
        if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in skip):
            del found[weight_id]
    return {name: found[id(p)] for name, p in module.named_parameters() if id(p) in found}


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
