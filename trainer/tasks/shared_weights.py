"""The weights of a model in a file, made once on a machine and mapped by all of its ranks.

Whoever comes first makes the model, and each parameter goes to the file as soon as a module has it: no more than one of
them is in memory beside it. The others wait: no rank reads, draws or quantizes the same weights again, nor does the
next start of what is kept. Parameters are private maps of that file: the ranks share its pages in memory, a page that
somebody writes to becomes his own, and what ZeRO-3 has cut is given back.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..data.cache import build_once
from ..data.errors import TaskError

_ALIGNED = 64  # bytes: what the widest vector instructions like
_AT_ONCE = 16 << 20  # bytes written before the system takes their pages back
Place = tuple[int, list[int], str]  # first byte, shape, type


class WeightFile:
    """Tensors one after another in a file that grows; any thread may add."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[int, Place] = {}  # by where the map is in memory
        self._maps: list[np.memmap[Any, Any]] = []
        self._end = self._given_back = 0
        self._lock = threading.Lock()
        path.touch()

    def add(self, tensor: Tensor) -> Tensor:
        """Write a tensor of the host; the map that holds the same from now on, and writes to the file."""
        plain = tensor.detach().contiguous()
        with self._lock:
            with self.path.open("r+b") as file:
                file.seek(self._end)
                plain.reshape(-1).view(torch.uint8).numpy().tofile(file)
            place = (self._end, list(plain.shape), str(plain.dtype).removeprefix("torch."))
            self._end += -(-plain.nbytes // _ALIGNED) * _ALIGNED
            kept = mapped(self.path, place, "r+", self._maps)
            self.places[kept.data_ptr()] = place
            if self._end > self._given_back + _AT_ONCE:
                self._give_back()
        return kept

    def place_of(self, tensor: Tensor) -> Place:
        """Where a tensor is, which is added unless it is one that `add` returned."""
        place = self.places.get(tensor.data_ptr()) if tensor.numel() else None
        return place if place is not None else self.places[self.add(tensor).data_ptr()]

    @contextmanager
    def taking_parameters(self) -> Iterator[None]:
        """While this lasts, what a module on the host gets as a parameter is in the file."""

        def take(module: nn.Module, name: str, p: nn.Parameter) -> nn.Parameter | None:
            if p is None or p.device.type != "cpu" or p.data_ptr() in self.places:
                return None
            kept = nn.Parameter(self.add(p), p.requires_grad)
            kept.__dict__.update(p.__dict__)
            return kept

        hook = register_module_parameter_registration_hook(take)  # type: ignore[arg-type]
        try:
            yield
        finally:
            hook.remove()

    def _give_back(self) -> None:
        for each in self._maps:
            each._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # loses nothing: the map is the file's
        self._given_back = self._end


def mapped(path: Path, place: Place, mode: Literal["c", "r+"] = "c", maps: list[Any] | None = None) -> Tensor:
    """The tensor at a place of a file; writing to it changes no file, unless `mode` is "r+". maps: gets its map."""
    begin, shape, name = place
    dtype: torch.dtype = getattr(torch, name)
    size = dtype.itemsize * int(np.prod(shape))
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    there = np.memmap(path, np.uint8, mode, begin, (size,))
    if maps is not None:
        maps.append(there)
    return torch.from_numpy(there).view(dtype).view(shape)


def shared_model(folder: Path, make: Callable[[], nn.Module], empty: Callable[[], Any]) -> nn.Module:
    """A model whose parameters are maps of files in `folder`, which is made first where it is not there yet.

    The caller's random numbers are left as they are, unless `make` had to draw all weights: then they are what they
    would be after it. What it had to draw beside pretrained weights is in no file: it stays on the meta device.

    Args:
        folder: Of this model alone: its name tells it from all others.
        make: The whole model. An attribute `drawn_weights` names those weights that it had to draw beside others.
        empty: The same model on the meta device.

    Raises:
        TaskError: The file cannot be written.
    """

    def build(private: Path) -> None:
        file = WeightFile(private / "weights")
        with torch.random.fork_rng(devices=[]):
            with file.taking_parameters():
                model = make()
            after = torch.random.get_rng_state()
        drawn: frozenset[str] | None = getattr(model, "drawn_weights", None)
        tensors: dict[str, Tensor] = {name: p.data for name, p in model.named_parameters() if name not in (drawn or ())}
        tensors |= {name: model.get_buffer(name) for name in model.state_dict().keys() & dict(model.named_buffers())}
        places = {name: file.place_of(tensor) for name, tensor in tensors.items()}
        (private / "places.json").write_text(json.dumps(places))
        if drawn is None:
            (private / "random").write_bytes(after.numpy().tobytes())

    try:
        build_once(folder, build)
    except OSError as error:
        raise TaskError(f"model: the weights cannot be kept in {folder}: {error.strerror}.") from error
    model = empty()
    _map(model, folder / "weights", json.loads((folder / "places.json").read_text()))
    if (folder / "random").exists():
        torch.random.set_rng_state(torch.frombuffer(bytearray((folder / "random").read_bytes()), dtype=torch.uint8))
    return model  # type: ignore[no-any-return]


def _map(model: nn.Module, path: Path, places: Mapping[str, Place]) -> None:
    for name, place in places.items():
        owner, _, last = name.rpartition(".")
        module, tensor = model.get_submodule(owner), mapped(path, place)
        if last in module._buffers:
            module._buffers[last] = tensor
        else:
            tensor = nn.Parameter(tensor, module._parameters[last].requires_grad)  # type: ignore[union-attr]
            tensor.mapped = True  # type: ignore[attr-defined]
            module._parameters[last] = tensor
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers draws it anew


def keep_from_sending(module: nn.Module) -> None:
    """Let DDP, ZeRO-1 and ZeRO-2 send no rank what it has mapped itself, and would have to copy to be written to."""
    frozen = {name: p for name, p in module.named_parameters() if getattr(p, "mapped", False) and not p.requires_grad}
    if not frozen:
        return
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(frozen))
    for p in frozen.values():
        p.ds_optim_param = True  # type: ignore[attr-defined]  # what DeepSpeed does not send
