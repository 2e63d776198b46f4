"""The accessor under DeepSpeed ZeRO: slices are views into the engine's own flat partitions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .shards import OF_A_WHOLE, Held, NoShard, Slice
from .spread import SpreadShards


class ZeroShards(SpreadShards):
    """What ZeRO-1/2 and ZeRO-3 share: flat fp32 masters of which a parameter's slice is a narrow view."""

    def __init__(self, module: nn.Module, engine: Any) -> None:
        self.engine = engine
        self.zero = engine.optimizer
        super().__init__(module, [self.zero.optimizer])
        self._held: dict[Tensor, dict[str, Held]] = {}

    def _flat(self, name: str) -> tuple[Tensor, int] | None:
        """The flat master that holds this rank's slice, and where in it; None if the slice is empty."""
        raise NotImplementedError

    def _stepped(self, name: str) -> tuple[Tensor, int] | None:
        """`_flat`, in memory or not."""
        return self._flat(name)

    def _flats(self) -> list[Tensor | None]:
        """All flat masters; None where one is not in memory."""
        raise NotImplementedError

    def _device(self) -> torch.device:
        return self.engine.device  # type: ignore[no-any-return]

    def _home(self) -> torch.device:
        """Where masters lie: the host's memory, if they are offloaded. Empty slices lie there too."""
        return next((flat.device for flat in self._flats() if flat is not None), self.engine.device)

    def master(self, name: str) -> Tensor:
        return self._narrow(name, None)

    def _narrow(self, name: str, flat: Tensor | None) -> Tensor:
        place = self._flat(name)
        if place is None:
            return torch.empty(0, device=self._home())
        return (place[0].data if flat is None else flat).view(-1).narrow(0, place[1], self.slices[name].length)

    def _entries_at(self, name: str) -> tuple[Tensor, dict[str, Any]] | None:
        place = self._flat(name)
        return None if place is None else (place[0], self.zero.optimizer.state[place[0]])

    def state(self, name: str) -> dict[str, Tensor]:
        if (at := self._entries_at(name)) is None:
            return {}
        flat, entries = at
        return {k: self._narrow(name, v) for k, v in entries.items() if torch.is_tensor(v) and v.shape == flat.shape}

    def scalars(self, name: str) -> dict[str, Any]:
        if (place := self._stepped(name)) is None:
            return {}
        flat = place[0]
        entries = self.zero.optimizer.state[flat]
        small = {k: v for k, v in entries.items() if not (torch.is_tensor(v) and v.shape == flat.shape)}
        others = {k for k in small if k.startswith(OF_A_WHOLE) and not k.endswith(f"@{name}")}
        return {k.removesuffix(f"@{name}"): v for k, v in small.items() if k not in others}

    def restore(self, name: str, state: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        if (at := self._entries_at(name)) is None:
            return
        flat, entries = at
        for key, value in state.items():
            if key not in entries:
                entries[key] = torch.zeros_like(flat.data, dtype=value.dtype)
            self._narrow(name, entries[key]).copy_(value)
        named = {k + f"@{name}" if k.startswith(OF_A_WHOLE) else k: v for k, v in scalars.items()}
        self._restore_scalars(entries, named, flat)

    def held(self, flat: Tensor) -> dict[str, Held]:
        """All parameters of a flat tensor that the optimizer steps, in one order on all ranks.

        Collective when first asked about a tensor: ranks tell each other what they have of each.
        """
        if flat not in self._held:
            members = {id(p) for p in self._members(flat)}
            names = [name for name, p in self.parameters.items() if id(p) in members]
            have = torch.tensor([float(self.slices[name].length > 0) for name in names], device=self.engine.device)
            dist.all_reduce(have)
            self._held[flat] = {}
            for name, ranks in zip(names, have.tolist(), strict=True):
                place = self._flat(name)
                start = 0 if place is None else place[1]
                self._held[flat][name] = Held(name, self.slices[name], start, ranks > 1, self, self.engine.device)
        return self._held[flat]

    def _members(self, flat: Tensor) -> list[nn.Parameter]:
        """The parameters of which a flat tensor, of this rank or of another one, has a part."""
        raise NotImplementedError

    def _renorm(self, name: str, norm: Tensor) -> None:
        """Offloaded: clipping reads norms that were taken when the gradient left the device."""
        self.zero.norm_for_param_grads[self.zero.get_param_id(self.parameters[name])] = norm.to(self.engine.device)

    def at_boundary(self) -> bool:
        return bool(self.engine.is_gradient_accumulation_boundary())


class Zero12Shards(ZeroShards):
    """ZeRO-1/2: every rank holds all low-precision weights, and masters and states of a flat partition."""

    layout = "shards of zero1 or zero2"

    def _slice(self, p: nn.Parameter) -> Slice:
        mapping = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Slice(0, 0, p.shape)
        return Slice(mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel, p.shape)

    def _flat(self, name: str) -> tuple[Tensor, int] | None:
        mapping = self.parameters[name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        return self.zero.single_partition_of_fp32_groups[mapping.param_group_index], mapping.hp_fragment_address.start

    def _flats(self) -> list[Tensor | None]:
        return list(self.zero.single_partition_of_fp32_groups)

    def gradient(self, name: str) -> Tensor | None:
        p = self.parameters[name]
        if p._hp_mapping is None:  # type: ignore[attr-defined]
            return None
        if self.zero.cpu_offload:  # the copies to the host are under way, and DeepSpeed waits in the step only
            self.zero._wait_for_offload_copies()
        fragment = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)  # type: ignore[attr-defined]
        return None if fragment is None else fragment.view(-1)

    def set_gradient(self, name: str, value: Tensor) -> None:
        super().set_gradient(name, value)
        if self.zero.cpu_offload and (view := self.gradient(name)) is not None:
            self._renorm(name, view.double().norm(2))

    def _members(self, flat: Tensor) -> list[nn.Parameter]:
        groups = zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True)
        return next(members for partition, members in groups if partition is flat)

    def whole(self, name: str) -> Tensor:
        p = self.parameters[name]
        # in full precision every rank's copy is the master itself
        return p.data if p.dtype == torch.float32 else super().whole(name)

    def publish(self) -> None:
        self.zero.update_lp_params()


class Zero3Shards(ZeroShards):
    """ZeRO-3: every parameter is cut into equal pieces, one a rank, the last ones padded."""

    layout = "shards of zero3"

    def _slice(self, p: nn.Parameter) -> Slice:
        piece = p.ds_tensor.numel()  # type: ignore[attr-defined]
        offset = min(dist.get_rank() * piece, p.ds_numel)  # type: ignore[attr-defined]
        return Slice(offset, min(piece, p.ds_numel - offset), torch.Size(p.ds_shape))  # type: ignore[attr-defined]

    def frozen(self) -> dict[str, tuple[Slice, Tensor]]:
        frozen = {}
        for name, p in self._frozen.items():
            where = self._slice(p)
            frozen[name] = (where, p.ds_tensor.data.view(-1)[: where.length])  # type: ignore[attr-defined]
        return frozen

    def whole_frozen(self, where: Slice, view: Tensor) -> Tensor:
        return self.gather_slice(where, view)  # by all ranks: one may have all of it, and another one nothing

    def __init__(self, module: nn.Module, engine: Any) -> None:
        super().__init__(module, engine)
        self._in_memory: int | None = None  # the sub-group that has been read from the drive
        if (swapper := self.zero.optimizer_swapper) is not None:
            self.drive = Path(swapper.swap_folder)

    def _group(self, name: str) -> int:
        """The sub-group that DeepSpeed steps at once, and has in memory at once, where states lie on a drive."""
        return int(self.zero.grad_position[self.zero.get_param_id(self.parameters[name])][0])

    def _on_drive(self, group: int) -> bool:
        return bool(self.zero._swappable_optimizer_subgroup(group))  # small ones stay in memory

    def each(self, edited: bool = False) -> Iterator[str]:
        if self.drive is None:
            yield from super().each(edited)
            return
        for group, names in groupby(sorted(self.slices, key=self._group), key=self._group):
            if not self._on_drive(group):
                yield from names
                continue
            with self._read(group, edited):
                yield from names

    @contextmanager
    def _read(self, group: int, edited: bool = False) -> Iterator[None]:
        """Have a sub-group in memory. Between steps only: gradients are not kept where it is `edited`."""
        self.zero._optimizer_states_and_gradient_swap_in(group)
        self._in_memory = group
        try:
            yield
            if edited:
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        finally:
            self._in_memory = None
            if edited:
                self.zero._optimizer_states_and_gradient_swap_out(group)
            else:
                self.zero._release_swap_buffers(group)

    def whole(self, name: str) -> Tensor:
        group = self._group(name)
        if not self._on_drive(group) or group == self._in_memory:
            return super().whole(name)
        with self._read(group):
            return super().whole(name)

    def _flats(self) -> list[Tensor | None]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def _stepped(self, name: str) -> tuple[Tensor, int] | None:
        if self.slices[name].length == 0:
            return None
        group, start, _ = self.zero.grad_position[self.zero.get_param_id(self.parameters[name])]
        return self.zero.fp32_partitioned_groups_flat[group], start

    def _flat(self, name: str) -> tuple[Tensor, int] | None:
        group = self._group(name)
        if self.drive is not None and self.slices[name].length and self._on_drive(group) and group != self._in_memory:
            raise NoShard(
                f"{name}'s master and states are on the drive: they are in memory in their turn of `each` only"
            )
        return self._stepped(name)

    def master_dtype(self, name: str) -> torch.dtype:
        return torch.float32 if (place := self._stepped(name)) is None else place[0].dtype

    def gradient(self, name: str) -> Tensor | None:
        if self.slices[name].length == 0:
            return None
        view, _ = self.zero._get_fp32_grad_state_partition(self.parameters[name], release_swap_buffers=True)
        view = view.view(-1)[: self.slices[name].length]
        return view.clone() if self._on_drive(self._group(name)) else view

    def set_gradient(self, name: str, value: Tensor) -> None:
        if self.slices[name].length == 0:
            return
        view, group = self.zero._get_fp32_grad_state_partition(self.parameters[name], release_swap_buffers=False)
        view = view.view(-1)[: self.slices[name].length]
        view.copy_(value)
        if self.zero.offload_optimizer:
            self._renorm(name, self.zero._constant_buffered_norm2(view))
        if self._on_drive(group):
            self.zero._writeback_swap_state(group, write_opt_state=False, write_gradients=True)

    def _members(self, flat: Tensor) -> list[nn.Parameter]:
        groups = zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True)
        return next(members for partition, members in groups if partition is flat)

    def publish(self) -> None:
        for p in (*self.parameters.values(), *self._frozen.values()):
            p.ds_secondary_tensor = None  # type: ignore[attr-defined]  # hpZ's copy is made anew from the first one
        for group in range(len(self.zero.fp16_groups)):
            if self._on_drive(group):  # `each` has done so, while it was in memory
                continue
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            persistent = self.zero.persistent_parameters
            persistent[0].partition(persistent)  # what is whole already would not be gathered again
            persistent[0].all_gather(persistent)
