"""Shrinking a model: which indices of every dimension stay, applied to weights, optimizer states and layer sizes.

A `Cut` says all there is to know: the same cut turns the same full-size model into the same small one, wherever it
comes from: the run that chose it, its checkpoint, or the configuration of an exported model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import ShoestringError

Sizes = Mapping[str, Any]


class WrongShape(ShoestringError):
    """A cut of another model."""


@dataclass(frozen=True)
class Cut:
    """The part of a model that is left.

    `kept`: parameter or buffer name -> [(dimension, a bool tensor over its indices that is True where one stays)].
    `sizes`: module name -> {attribute: its new value}, for what layers keep about their shapes (out_features, heads).
    """

    kept: Mapping[str, tuple[tuple[int, Tensor], ...]]
    sizes: Mapping[str, Sizes]

    def indices(self) -> dict[str, list[tuple[int, Tensor]]]:
        """Parameter name -> [(dimension, indices kept, ascending)]."""
        return {name: [(dim, mask.nonzero().view(-1)) for dim, mask in dims] for name, dims in self.kept.items()}

    def state(self) -> dict[str, Any]:
        """Plain data, a bit for every index: for checkpoints and JSON."""
        packed = {name: [[dim, len(mask), _pack(mask)] for dim, mask in dims] for name, dims in self.kept.items()}
        sizes = {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in counts.items()}
            for name, counts in self.sizes.items()
        }
        return {"kept": packed, "sizes": sizes}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Cut:
        """The cut of which `state` was taken."""
        kept = {
            name: tuple((dim, _unpack(bits, length)) for dim, length, bits in dims)
            for name, dims in state["kept"].items()
        }
        sizes = {
            name: {k: tuple(v) if isinstance(v, list) else v for k, v in counts.items()}
            for name, counts in state["sizes"].items()
        }
        return cls(kept, sizes)


def _pack(mask: Tensor) -> str:
    bits = "".join("1" if kept else "0" for kept in mask.tolist())
    return f"{int(bits, 2):x}" if bits else ""


def _unpack(packed: str, length: int) -> Tensor:
    bits = f"{int(packed, 16):0{length}b}" if length else ""
    return torch.tensor([bit == "1" for bit in bits], dtype=torch.bool)


def shrink_tensor(tensor: Tensor, kept: Iterable[tuple[int, Tensor]]) -> Tensor:
    """A copy of `tensor` with only the indices that a cut keeps: a weight, its gradient or a state of its shape."""
    for dim, mask in kept:
        if tensor.shape[dim] != len(mask):
            raise WrongShape(f"dimension {dim} has {tensor.shape[dim]} indices, and the cut is of {len(mask)}")
        tensor = tensor.index_select(dim, mask.nonzero().view(-1).to(tensor.device))
    return tensor.clone(memory_format=torch.contiguous_format)


def renew(module: nn.Module, values: Mapping[str, Tensor]) -> dict[int, nn.Parameter]:
    """Give `module` new parameters and buffers, of any shape, wherever the old ones were used.

    `values`: name, as `named_parameters` or `named_buffers` has it -> tensor. Returns id of the old parameter -> new.
    """
    parameters = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    renewed = {
        id(parameters[name]): nn.Parameter(value.to(parameters[name].dtype), parameters[name].requires_grad)
        for name, value in values.items()
        if name in parameters
    }
    other = {id(buffers[name]): value for name, value in values.items() if name in buffers}
    for part in module.modules():
        for key, p in list(part._parameters.items()):
            if p is not None and id(p) in renewed:
                part._parameters[key] = renewed[id(p)]
        for key, b in list(part._buffers.items()):
            if b is not None and id(b) in other:
                part._buffers[key] = other[id(b)]
    return renewed


@torch.no_grad()
def shrink(module: nn.Module, cut: Cut) -> None:
    """Cut `module` in place. Its parameters are new objects afterwards: optimizers must be told."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if stray := cut.kept.keys() - named.keys():
        raise WrongShape(f"the cut is of another model: this one has no {', '.join(sorted(stray))}")
    try:
        renew(module, {name: shrink_tensor(named[name].detach(), kept) for name, kept in cut.kept.items()})
    except WrongShape as error:
        raise WrongShape(f"the cut is of another model: {error}") from None
    parts = dict(module.named_modules())
    for name, sizes in cut.sizes.items():
        for attribute, value in sizes.items():
            setattr(parts[name], attribute, value)


def is_shrunk(module: nn.Module, cut: Cut) -> bool:
    """Whether `module` has the shapes that `cut` leaves already."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return bool(cut.kept) and all(
        name in named and named[name].shape[dim] == int(mask.sum()) for name, kept in cut.kept.items()
        for dim, mask in kept
    )  # fmt: skip


def rebuild_model(module: nn.Module, cuts: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Apply the states of `cuts`, one after another, to a full-size `module`; what has been applied already is not.

    A model saved with `save_pretrained` comes back as
    `rebuild_model(AutoModel.from_config(config), config.structured_cut)`, and then loads its weights.
    """
    all_of_them = [Cut.of(state) for state in cuts]
    done = max((i + 1 for i, cut in enumerate(all_of_them) if is_shrunk(module, cut)), default=0)
    for cut in all_of_them[done:]:
        shrink(module, cut)
    return module


def update_configurations(module: nn.Module, cuts: Sequence[Mapping[str, Any]]) -> None:
    """Write `cuts` as `structured_cut` into the configurations of the Hugging Face models in `module`."""
    updated: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(outer) for outer in updated)
        if inside or not (hasattr(part, "save_pretrained") and hasattr(getattr(part, "config", None), "to_dict")):
            continue
        prefix = f"{name}." if name else ""
        updated.append(prefix)
        own = [
            {key: {n.removeprefix(prefix): v for n, v in cut[key].items() if n.startswith(prefix)} for key in cut}
            for cut in cuts
        ]
        part.config.structured_cut = own  # type: ignore[union-attr]
