"""The sharded-state accessor: weights, gradients, optimizer state on one device, under DDP, ZeRO-1/2/3 and FSDP2.

Under every strategy each rank holds, of every trainable parameter, one contiguous slice of its flattened elements:
all of it on one device and under DDP, a piece (maybe empty) under ZeRO and FSDP2. The accessor gives that slice of the
master weight, of the gradient and of each optimizer state as a 1-D view: what is written there is what the optimizer
uses.

Two facts make local edits exact without communication:
  * edits made at the accumulation boundary, before the step, reach every copy, because the step itself refreshes the
    low-precision and the gathered weights from the masters (an edit of `p.data` is undone by the next step);
  * an element whose weight, gradient and state are zero stays exactly zero under every element-wise optimizer.

In ZeRO a gradient exists only between backward and step, so techniques act in `on_before_optimizer_step` and ask
`at_boundary()` first: Lightning calls that hook on every micro-batch under DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import ShoestringError


class NoShard(ShoestringError):
    """The strategy keeps its parameters where no accessor can reach."""


OF_A_WHOLE = "whole "  # how states begin that go with a whole parameter, on each rank that has a part of it


@dataclass(frozen=True)
class Slice:
    """Which elements of a flattened parameter this rank holds: [offset, offset + length) of `numel`."""

    offset: int
    length: int
    shape: torch.Size

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's elements of a tensor shaped like the parameter."""
        return whole.reshape(-1)[self.offset : self.offset + self.length]


@dataclass(frozen=True)
class Held:
    """What a flat tensor of ZeRO, which its optimizer steps, has of one parameter.

    Attributes:
        name: The parameter's.
        where: Which of its elements they are: none, where other ranks have it.
        start: Where in the flat tensor they begin.
        shared: Several ranks have a part of it.
        shards: The accessor.
        device: Where the model is, while the optimizer's step may be on the host.
    """

    name: str
    where: Slice
    start: int
    shared: bool
    shards: Shards
    device: torch.device

    def narrow(self, flat: Tensor) -> Tensor:
        """Their view [length] of a tensor laid out as the flat one."""
        return flat.view(-1).narrow(0, self.start, self.where.length)

    def whole(self, local: Tensor) -> Tensor:
        """The parameter's whole tensor from every rank's part. Collective where it is shared."""
        if not self.shared:
            return local.view(self.where.shape)
        return self.shards.gather_slice(self.where, local).to(local.device)

    def total(self, value: Tensor) -> Tensor:
        """The sum over its parts. Collective where it is shared."""
        return self.shards.total(value.to(self.device)) if self.shared else value


def lay_out_plainly(module: nn.Module) -> None:
    """Give every parameter torch's plain, contiguous layout, in place; channels_last weights and the like lose theirs.

    Slices are views of flattened parameters, which no other layout has. Values, and what layers compute, stay.

    Raises:
        NoShard: Such a parameter shares memory with another one: apart, they would no longer be the same weights.
    """
    strange = {name: p for name, p in module.named_parameters() if not p.data.is_contiguous()}
    for name, p in strange.items():
        memory = p.data.untyped_storage().data_ptr()
        for other, q in module.named_parameters():
            if q is not p and memory and q.data.untyped_storage().data_ptr() == memory:
                raise NoShard(
                    f"parameter {name} is a view of {other} with strides {tuple(p.stride())}; register one parameter "
                    "and transpose it in forward"
                )
    for p in strange.values():
        p.data = p.data.contiguous()
        if p.grad is not None:
            p.grad = p.grad.contiguous()


class Shards:
    """One device and DDP: every rank holds everything, and the parameter is its own master.

    `parameters` are the trainable ones by name; `slices` says what this rank holds of each.
    """

    replicated = True  # every rank holds all elements
    layout = "whole parameters"  # what a rank has of each, in words
    drive: Path | None = None  # the folder that masters and states lie in, if not in memory

    def __init__(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        lay_out_plainly(module)
        # what an optimizer has stepped is trained, also while it is frozen for a time
        stepped = {p for o in optimizers for p in o.state if isinstance(p, nn.Parameter)}
        trained = {name for name, p in module.named_parameters() if p.requires_grad or p in stepped}
        self.parameters = {name: p for name, p in module.named_parameters() if name in trained}
        self._frozen = {name: p for name, p in module.named_parameters() if name not in trained}
        self.optimizers = optimizers
        self.slices = {name: self._slice(p) for name, p in self.parameters.items()}

    def each(self, edited: bool = False) -> Iterator[str]:
        """Names of all parameters. Masters and states that lie on a drive are in memory for their turn alone.

        Args:
            edited: They are written back, where they lie on a drive, and published.
        """
        yield from self.slices

    # -- views of this rank's slice ----------------------------------------------------------------------------------
    def master(self, name: str) -> Tensor:
        """The weights the optimizer updates, [length]."""
        return self.parameters[name].data.view(-1)

    def master_dtype(self, name: str) -> torch.dtype:
        """What the optimizer updates the weights in."""
        return self.master(name).dtype

    def gradient(self, name: str) -> Tensor | None:
        """The averaged gradient of the whole global batch, [length]; None where there is none. At the boundary only."""
        grad = self.parameters[name].grad
        return None if grad is None else grad.view(-1)

    def state(self, name: str) -> dict[str, Tensor]:
        """Optimizer states that go element by element with the parameter (exp_avg, …), each [length]."""
        p = self.parameters[name]
        entries = self._entries(p)
        whole = [k for k, v in entries.items() if torch.is_tensor(v) and v.shape == p.shape]
        for key in whole:
            entries[key] = entries[key].contiguous()  # made or read before the weights were
        return {key: entries[key].view(-1) for key in whole}

    def scalars(self, name: str) -> dict[str, Any]:
        """The optimizer's other states of this parameter: step counts, factored moments."""
        p = self.parameters[name]
        return {k: v for k, v in self._entries(p).items() if not (torch.is_tensor(v) and v.shape == p.shape)}

    def restore(self, name: str, state: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Put back what `state` and `scalars` gave; creates the optimizer's entries where it has not stepped yet."""
        p = self.parameters[name]
        entries = self._entries(p)
        for key, value in state.items():
            entries[key] = value.to(p.device, copy=True).view(p.shape)
        self._restore_scalars(entries, scalars, p)

    def _restore_scalars(self, entries: dict[str, Any], scalars: Mapping[str, Any], p: Tensor) -> None:
        """A fused optimizer counts its steps on the parameter's device, any other one on the host."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        fused = any(group.get("fused") or group.get("capturable") for group in groups)
        for key, value in scalars.items():
            if torch.is_tensor(value):
                device = p.device if fused or key != "step" else torch.device("cpu")
                entries[key] = value.to(device, copy=True)
            else:
                entries[key] = value

    def frozen(self) -> dict[str, tuple[Slice, Tensor]]:
        """Parameters without gradients: this rank's slice and a view of it."""
        return {n: (Slice(0, p.numel(), p.shape), p.data.view(-1)) for n, p in self._frozen.items()}

    def set_gradient(self, name: str, value: Tensor) -> None:
        """Replace the gradient at the boundary, [length]."""
        view = self.gradient(name)
        if view is not None:
            view.copy_(value)

    def beside_masters(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What goes with this rank's slices, each where its master lies: on the host, where masters are offloaded."""
        return {name: tensor.to(self.master(name).device) for name, tensor in named.items()}

    # -- the few moments that need more than the slice --------------------------------------------------------------
    def at_boundary(self) -> bool:
        """Whether the optimizer steps after this micro-batch."""
        return True

    def publish(self) -> None:
        """After editing masters between steps: refresh every copy made of them."""

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks that hold different slices. Collective where sharded."""
        return values

    def gather(self, name: str, local: Tensor) -> Tensor:
        """The whole tensor from every rank's slice, in the parameter's shape. Collective where sharded."""
        return self.gather_slice(self.slices[name], local)

    def whole(self, name: str) -> Tensor:
        """The whole master weight, in its shape. Collective where no rank has all of it."""
        return self.gather(name, self.master(name))

    def whole_frozen(self, where: Slice, view: Tensor) -> Tensor:
        """The whole of what `frozen` gave a slice of, in its shape. Collective where frozen parameters are sharded."""
        return view.view(where.shape)

    def gather_slice(self, where: Slice, local: Tensor) -> Tensor:
        """`gather` of a slice that is no parameter's."""
        return local.view(where.shape)

    def _slice(self, p: nn.Parameter) -> Slice:
        return Slice(0, p.numel(), p.shape)

    def _entries(self, p: nn.Parameter) -> dict[str, Any]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(p is q for q in group["params"]):
                    return optimizer.state[p]
        return {}
