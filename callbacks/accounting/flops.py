"""Count matrix FLOPs by watching a real step: forward, backward and recomputation, whatever the step happens to do.

A FLOP count is taken once for every new kind of step (batch shape, set of trainable parameters, masks) and looked up
afterwards, so it follows sequence length, batch size, freezing and checkpointing, and costs nothing in between.

  realised   what the device executed: recomputation included, masked-dense weights at full cost
  counted    what the mathematics needs: no recomputation, products with a masked weight times its density.
             Gradients with respect to a masked weight count in full, since the dense gradient is computed.

What a model is asked aside from its step, once a run (`evaluating`), counts as neither: it is no part of such a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..contract import Technique
from ..forward.isolated_step import is_evaluating


@dataclass(frozen=True)
class Flops:
    """Multiply and add count as two."""

    counted: float = 0.0
    realised: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.counted + other.counted, self.realised + other.realised)


NOTHING = Flops()


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
# a copy of a masked weight made by these has its zeros: casts, soft masks, fake quantization
_COPIES = {getattr(torch.ops.aten, name) for name in ("_to_copy", "mul", "div", "round", "clamp")}


class FlopCounter(TorchDispatchMode):
    """`with FlopCounter() as counter: step()` -> `counter.flops`.

    `densities` maps a parameter's storage pointer to the share of its elements that are not masked; copies of its shape
    inherit it for as long as they live. Under ZeRO-3 and FSDP2 gathered weights have other pointers, so there masked
    weights count as dense.
    """

    def __init__(self, densities: Mapping[int, float] | None = None) -> None:
        super().__init__()
        self._densities = dict(densities or {})
        self._copies: dict[int, tuple[float, StorageWeakRef]] = {}
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
        elif self._densities and packet in _COPIES and (density := self._density(args[:1])) != 1.0:
            self._copied(out, args[0], density)
        return out

    def _copied(self, out: torch.Tensor, source: torch.Tensor, density: float) -> None:
        if out.shape == source.shape:
            storage = out.untyped_storage()
            self._copies[storage.data_ptr()] = density, StorageWeakRef(storage)

    def _add(self, amount: float, args: Any) -> None:
        if is_evaluating():
            return
        self._realised += amount
        if not _recomputed():
            self._counted += amount * (self._density(args) if self._densities else 1.0)

    def _density(self, args: Any) -> float:
        for arg in args:
            if isinstance(arg, torch.Tensor):
                pointer = arg.untyped_storage().data_ptr()
                if (density := self._densities.get(pointer)) is not None:
                    return density
                copied, storage = self._copies.get(pointer, (1.0, None))
                if storage is not None and not storage.expired():  # else the memory is somebody else's by now
                    return copied
        return 1.0


def _recomputed() -> bool:
    """Whether this is computed in backward only because forward did not keep it.

    Nothing else there runs with gradients enabled, or saves tensors through hooks; the forward of an
    `autograd.Function` does only the latter.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    return torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class StepFlops:
    """The FLOPs of micro-batches: counted for each new kind of them, looked up for the others.

    techniques: are asked for their `densities` and for the `step_kind`.
    """

    def __init__(self, module: nn.Module, techniques: Sequence[Technique]) -> None:
        self._module, self._techniques = module, techniques
        self._kinds = [t.step_kind for t in techniques if type(t).step_kind is not Technique.step_kind]
        self._parameters = list(module.parameters())
        self._known: dict[Any, Flops] = {}
        self._kind: tuple[Any, ...] = ()
        self._earlier = NOTHING  # of the parts of this micro-batch that have ended
        self._counter: FlopCounter | None = None

    def forget(self) -> None:
        """The model has other shapes now: count every kind of step anew."""
        self._parameters, self._known = list(self._module.parameters()), {}

    def begin(self, shape: tuple[int, ...], steps: bool) -> None:
        """A micro-batch of this shape begins; `steps`: the optimizer, which may multiply matrices, steps after it."""
        trainable = bytes([p.requires_grad for p in self._parameters])
        self._earlier = NOTHING
        kind: tuple[Any, ...] = (shape, trainable, steps)
        if self._kinds:
            kind += tuple(own() for own in self._kinds)
        self._watch(kind)

    def chosen(self, shape: tuple[int, ...]) -> None:
        """Samples have been chosen: what it took ends here, and the rest of the micro-batch has this shape."""
        self._earlier = self.end()
        self._watch((*self._kind, shape))

    def end(self) -> Flops:
        """The micro-batch has ended: what it took; nothing where none was begun."""
        if self._counter is not None:
            self._known[self._kind] = self.abort()
        last = self._known.get(self._kind, NOTHING)
        return last if self._earlier is NOTHING else self._earlier + last

    def _watch(self, kind: tuple[Any, ...]) -> None:
        self._kind = kind
        if kind not in self._known:
            self._counter = FlopCounter(self._densities())
            self._counter.__enter__()

    def abort(self) -> Flops:
        """Stop watching, also in the middle of a micro-batch that failed; what was seen of it."""
        counter, self._counter = self._counter, None
        if counter is None:
            return NOTHING
        counter.__exit__(None, None, None)
        return counter.flops

    def _densities(self) -> dict[int, float]:
        kept = {name: density for t in self._techniques for name, density in t.densities().items()}
        named = self._module.named_parameters() if kept else ()
        here = ((name, p) for name, p in named if name in kept and not hasattr(p, "to_local"))
        return {p.untyped_storage().data_ptr(): kept[name] for name, p in here}
