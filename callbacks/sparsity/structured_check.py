"""Cuts are proved before they are kept: dependency graphs follow shapes, and a model may move channels unseen.

After a permutation before a flatten, a roll, or heads that share keys, a graph names the wrong indices. So the cut
model must compute what the whole one computes with the cut channels set to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ... import ShoestringError
from ..forward.forward_weights import as_they_are
from ..forward.isolated_step import evaluating
from ..parameters.cut import Cut, shrink

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
REPEATS = 64  # ways in which the same cut reaches one layer; more are a circle
TOLERANCE = 1e-3


class CannotTrace(ShoestringError):
    """The model's forward cannot be followed, or does not run with fewer channels."""


class _Endless(Exception):
    """A dependency that comes back with ever other indices."""


# -- groups, in bounded time -------------------------------------------------------------------------------------------
def bounded_groups(graph: Any, module: nn.Module) -> Iterator[Any]:
    """torch-pruning's groups of a graph, but for those whose search would not end: layers in these stay whole.

    Where heads share keys and values, a channel is mapped around in a circle, to other indices each time.
    """
    widest = max((max(p.shape, default=1) for p in module.parameters()), default=1)
    visited: set[nn.Module] = set()
    for layer in [layer for layer in graph.module2node if isinstance(layer, LAYERS)]:
        pruner = graph.get_pruner_of_module(layer)
        if layer in visited or pruner is None or pruner.get_out_channels(layer) is None:
            continue
        try:
            with _limited(4 * widest):
                channels = list(range(pruner.get_out_channels(layer)))
                group = graph.get_pruning_group(layer, pruner.prune_out_channels, channels)
        except _Endless:
            continue
        visited.update(item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler))
        yield group


@contextmanager
def _limited(widest: int) -> Iterator[None]:
    from torch_pruning.dependency import graph as searched

    plain: Any = searched.Group  # type: ignore[attr-defined]

    counts: dict[Any, int] = {}

    class Limited(plain):  # type: ignore[misc]
        def add_dep(self, dep: Any, idxs: Any) -> None:
            key = id(self), id(dep.target), dep.handler
            counts[key] = counts.get(key, 0) + 1
            if counts[key] > REPEATS or len(idxs) > widest:
                raise _Endless
            super().add_dep(dep, idxs)

    searched.Group = Limited  # type: ignore[attr-defined]
    try:
        yield
    finally:
        searched.Group = plain  # type: ignore[attr-defined]


# -- what a cut computes -----------------------------------------------------------------------------------------------
def check_cut(module: nn.Module, forward: Callable[[], Any], cut: Cut) -> None:
    """Raise `CannotTrace` unless `cut` leaves what the model computes with its gone channels at zero.

    `forward()` runs the module, in evaluation mode here. Compared are its floating outputs, and those of the last layer
    that has kept all its own. Leaves the module as it is.
    """
    with restored(module), evaluating(module), as_they_are(), torch.no_grad():
        with restored(module):
            _blank(module, cut)
            masked = _outputs(module, forward, cut, masked=True)
        try:
            shrink(module, cut)
            small = _outputs(module, forward, cut)
        except Exception as error:
            raise CannotTrace(
                f"the model does not run with fewer channels: {type(error).__name__}: {error}. Some layer's width is "
                "written into its forward: name its parameters in structured_pruning's `skip`."
            ) from error
    if difference := _difference(small, masked):
        raise CannotTrace(
            f"the cut model computes something else than the whole one without the cut channels (relative difference "
            f"{difference:.2g}): some layer of {', '.join(sorted({n.rpartition('.')[0] for n in cut.kept})[:6])} moves "
            "channels in a way that cannot be followed. Name its parameters in structured_pruning's `skip`."
        )


def _difference(small: list[Tensor], masked: list[Tensor]) -> float:
    """The largest relative difference above the tolerance; 0 where there is none."""
    if [t.shape for t in small] != [t.shape for t in masked]:
        return float("inf")
    for output, wanted in zip(small, masked, strict=True):
        allowed = TOLERANCE if output.dtype in (torch.float32, torch.float64) else 5e-2
        error = float((output.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
        if not error <= allowed:
            return error
    return 0.0


def _outputs(module: nn.Module, forward: Callable[[], Any], cut: Cut, *, masked: bool = False) -> list[Tensor]:
    last: list[Tensor] = []
    names = {part: name for name, part in module.named_modules()}

    def keep(part: nn.Module, inputs: Any, output: Any) -> None:
        last[:] = [output]

    def norm(part: Any, inputs: Any, output: Tensor) -> Tensor:
        """Over the channels that stay, as the cut model has it."""
        mask = dict(cut.kept[_named(names[part], "weight")])[0].to(output.device)
        bias = None if part.bias is None else part.bias[mask]
        narrow = nn.functional.layer_norm(inputs[0][..., mask], (int(mask.sum()),), part.weight[mask], bias, part.eps)
        whole = torch.zeros_like(output)
        whole[..., mask] = narrow
        return whole

    with ExitStack() as hooks:
        for part, name in names.items():
            kept = dict(cut.kept.get(_named(name, "weight"), ()))
            if isinstance(part, LAYERS) and int(getattr(part, "transposed", False)) not in kept:
                hooks.callback(part.register_forward_hook(keep).remove)
            elif masked and kept and isinstance(part, nn.LayerNorm):
                hooks.callback(part.register_forward_hook(norm).remove)
        given = forward()
    values = dict(given) if hasattr(given, "keys") else given
    return [t for t in [*tree_leaves(values), *last] if isinstance(t, Tensor) and t.is_floating_point()]


def _named(part: str, parameter: str) -> str:
    return f"{part}.{parameter}" if part else parameter


def _blank(module: nn.Module, cut: Cut) -> None:
    """Set the channels to zero that `cut` takes away."""
    for name, p in module.named_parameters():
        if name in cut.kept:
            blank = p.detach().clone()
            for dim, mask in cut.kept[name]:
                blank.index_fill_(dim, (~mask).nonzero().view(-1).to(blank.device), 0.0)
            p.data = blank


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Afterwards the module has the tensors, attributes and sizes back that it had."""
    parameters = [(p, p.data) for p in module.parameters()]
    attributes = [(part, dict(vars(part)), dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for p, data in parameters:
            p.data = data
        for part, values, own, held in attributes:
            vars(part).clear()
            vars(part).update(values)
            part._parameters.clear()
            part._parameters.update(own)
            part._buffers.clear()
            part._buffers.update(held)
