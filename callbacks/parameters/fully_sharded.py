"""The accessor under FSDP2: every parameter is a DTensor, of which a rank holds a run of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from .shards import OF_A_WHOLE, Held, NoShard, Slice
from .spread import SpreadShards, here


class FullyShardedShards(SpreadShards):
    """Rows [r * n, (r + 1) * n) of each parameter are rank r's, with n rounded up: the last ranks may have none."""

    layout = "shards of fsdp2"

    def __init__(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self._sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        super().__init__(module, optimizers)
        self._names: dict[Tensor, str] = {p: name for name, p in self.parameters.items()}

    def _device(self) -> torch.device:
        return next(here(p).device for p in (*self.parameters.values(), *self._frozen.values()))

    def _slice(self, p: nn.Parameter) -> Slice:
        if not isinstance(p, DTensor) or p.placements != (Shard(0),):
            laid = p.placements if isinstance(p, DTensor) else "whole"
            raise NoShard(
                f"a parameter of shape {tuple(p.shape)} is {laid} beside DTensors; of these, the accessor reaches what "
                "is split by rows alone. Use strategy fsdp2, ddp or zero3."
            )
        rows, row = _rows(p), p.shape[1:].numel()
        begin = min(p.device_mesh.get_local_rank() * rows, p.shape[0])
        return Slice(begin * row, here(p).numel(), p.shape)

    def master(self, name: str) -> Tensor:
        return here(self.parameters[name]).view(-1)

    def gradient(self, name: str) -> Tensor | None:
        grad = self.parameters[name].grad
        return None if grad is None else here(grad).view(-1)

    def state(self, name: str) -> dict[str, Tensor]:
        return {
            key: here(v).view(-1) for key, v in self._entries(self.parameters[name]).items() if self._goes(name, key, v)
        }

    def scalars(self, name: str) -> dict[str, Any]:
        entries = self._entries(self.parameters[name])
        return {k.removesuffix(f"@{name}"): v for k, v in entries.items() if not self._goes(name, k, v)}

    def _goes(self, name: str, key: str, value: Any) -> bool:
        """Whether a state goes element by element with a parameter: of its shape, or of the shape of its slice."""
        p = self.parameters[name]
        return (
            not key.startswith(OF_A_WHOLE)
            and torch.is_tensor(value)
            and value.shape == (p if isinstance(value, DTensor) else here(p)).shape
        )

    def restore(self, name: str, state: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        p = self.parameters[name]
        assert isinstance(p, DTensor)
        entries, slices = self._entries(p), self._stepped_as_slice(p)
        for key, value in state.items():
            kept = value.to(p.device, copy=True).view(here(p).shape)
            entries[key] = kept if slices else DTensor.from_local(
                kept, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )  # fmt: skip
        named = {k + f"@{name}" if k.startswith(OF_A_WHOLE) else k: v for k, v in scalars.items()}
        self._restore_scalars(entries, named, p)

    def _stepped_as_slice(self, p: nn.Parameter) -> bool:
        """Whether the optimizer, which says so itself, keeps state of a slice, and not a DTensor's."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(p is q for q in group["params"]):
                    return hasattr(optimizer, "by_slices") and optimizer.by_slices(group)
        return False

    def frozen(self) -> dict[str, tuple[Slice, Tensor]]:
        return {name: (self._slice(p), here(p).view(-1)) for name, p in self._frozen.items()}

    def whole_frozen(self, where: Slice, view: Tensor) -> Tensor:
        return self.gather_slice(where, view)

    def held(self, stepped: Tensor) -> dict[str, Held]:
        """The parameter that an optimizer steps: it has a slice of it."""
        name = self._names[stepped]
        p, where = self.parameters[name], self.slices[name]
        return {name: Held(name, where, 0, p.shape[0] > _rows(p), self, self._device())}

    def publish(self) -> None:
        """Let go of gathered weights: they are gathered anew, from what ranks hold, when they are used."""
        for part in self._sharded:
            part.reshard()


def _rows(p: Any) -> int:
    """Of a rank, but for the last ones."""
    return max(1, -(-p.shape[0] // p.device_mesh.size()))
