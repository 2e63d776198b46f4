"""What layers compute with instead of their weights: masked, quantized or clustered copies, made anew in each forward.

The parameter itself stays where it is and what it is, so optimizers, DDP, ZeRO and checkpoints see nothing of it. For
the length of a layer's `forward` the attribute `weight` shows `function(name, weight)`; `straight_through` lets
the gradient reach the parameter. Several of them on one layer apply in the order in which they were installed.

Under ZeRO-3 the whole weight is there during `forward`, gathered by the engine; the copy lives as long as autograd
needs it, so combine with `gradient_checkpointing` where memory counts: backward then makes the copy again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ... import ShoestringError


class NeverUsed(ShoestringError):
    """A layer's weight was never used through the layer's own `forward`, so it cannot be replaced there."""


def straight_through(weight: Tensor, shown: Tensor) -> Tensor:
    """`shown` in forward, bit for bit, with the gradient going to `weight` unchanged (arXiv 1308.3432)."""
    return _StraightThrough.apply(weight, shown)  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, shown: Tensor) -> Tensor:
        return shown.view_as(shown)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


_plain: list[bool] = []  # inside `as_they_are`


@contextmanager
def as_they_are() -> Iterator[None]:
    """Inside, all layers compute with their own weights."""
    _plain.append(True)
    try:
        yield
    finally:
        _plain.pop()


class ForwardWeights:
    """Let the layers that own the weights `names` of `module` see `function(name, weight)` until `remove`d.

    A weight that several layers share is replaced in each of them.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], function: Callable[[str, Tensor], Tensor]) -> None:
        wanted = {id(p): name for name, p in module.named_parameters() if name in frozenset(names)}
        self._unused = set(wanted.values())
        self._function = function
        self._handles: list[Any] = []
        self._layers: list[tuple[nn.Module, str]] = []
        for layer in module.modules():
            weight = layer._parameters.get("weight")
            if weight is not None and id(weight) in wanted:
                self._layers.append((layer, wanted[id(weight)]))
        self.reinstall()

    def reinstall(self) -> None:
        """Act after all other hooks again: a new ZeRO-3 engine gathers weights in hooks that are younger than ours."""
        self.remove()
        for layer, name in self._layers:
            self._install(layer, name)

    def _install(self, layer: nn.Module, name: str) -> None:
        def show(layer: nn.Module, inputs: Any) -> None:
            self._unused.discard(name)
            if _plain:
                return
            # an instance's own attribute is found before its parameters
            layer.__dict__["weight"] = self._function(name, layer.weight)  # type: ignore[arg-type]

        def hide(layer: nn.Module, inputs: Any, output: Any) -> None:
            layer.__dict__.pop("weight", None)

        self._handles.append(layer.register_forward_pre_hook(show))
        self._handles.append(layer.register_forward_hook(hide, always_call=True))

    def check_used(self, technique: str) -> None:
        """Raise `NeverUsed` if some layer has not run by now: call it after the first step."""
        if self._unused:
            raise NeverUsed(
                f"{technique}: {', '.join(sorted(self._unused))} not used in the first step through the forward of "
                f"its layer (nn.MultiheadAttention reads the weight of its out_proj itself). Add it to `skip`."
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
