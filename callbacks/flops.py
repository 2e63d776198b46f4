"""Count matrix FLOPs by watching a real step: forward, backward and recomputation, whatever the step happens to do.

A FLOP count is taken once for every new kind of step (batch shape, set of trainable parameters, masks) and looked up
afterwards, so it follows sequence length, batch size, freezing and checkpointing, and costs nothing in between.

  realised   what the device executed: recomputation included, masked-dense weights at full cost
  counted    what the mathematics needs: no recomputation, products with a masked weight times its density.
             Gradients with respect to a masked weight count in full, since the dense gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Flops:
    """Multiply and add count as two."""

    counted: float = 0.0
    realised: float = 0.0


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _sdpa_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch registers the CUDA kernels only
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    **flop_registry,
}
_CASTS = {torch.ops.aten._to_copy}


class FlopCounter(TorchDispatchMode):
    """`with FlopCounter() as counter: step()` -> `counter.flops`.

    `densities` maps a parameter's storage pointer to the share of its elements that are not masked; copies made by
    autocast inherit it. Under ZeRO-3 gathered weights have other pointers, so there masked weights count as dense.
    """

    def __init__(self, densities: Mapping[int, float] | None = None) -> None:
        super().__init__()
        self._densities = dict(densities or {})
        self._counted = self._realised = 0.0

    @property
    def flops(self) -> Flops:
        return Flops(self._counted, self._realised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if (formula := _FORMULAS.get(packet)) is not None:
            self._add(formula(*args, **kwargs, out_val=out), args)
        elif self._densities and packet in _CASTS and (density := self._density(args[:1])) != 1.0:
            self._densities[out.untyped_storage().data_ptr()] = density
        return out

    def _add(self, amount: float, args: Any) -> None:
        self._realised += amount
        # inside backward, only recomputation runs with gradients enabled
        recomputed = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        if not recomputed:
            self._counted += amount * (self._density(args) if self._densities else 1.0)

    def _density(self, args: Any) -> float:
        for arg in args:
            if isinstance(arg, torch.Tensor):
                density = self._densities.get(arg.untyped_storage().data_ptr())
                if density is not None:
                    return density
        return 1.0
