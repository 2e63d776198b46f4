"""The weights of a frozen base, made once on a machine and mapped by all of its ranks.

Whoever comes first makes the model, and each part that is quantized goes to a file as soon as it is there. The others
wait: no rank quantizes the same weights again, nor does the next start. Parameters are private maps of that file: the
ranks share its pages in memory, a page that somebody writes to becomes his own, and what ZeRO-3 has cut is given back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.cache import build_once
from ..data.errors import TaskError

_ALIGNED = 64  # bytes: what the widest vector instructions like
Place = tuple[int, list[int], str]  # first byte, shape, type


class WeightFile:
    """Tensors one after another in a file that grows; any thread may add."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[int, Place] = {}  # by where the map is in memory
        self._end = 0
        self._lock = threading.Lock()
        path.touch()

    def add(self, tensor: Tensor) -> Tensor:
        """Write a tensor of the host; the map that holds the same from now on."""
        plain = tensor.detach().contiguous()
        with self._lock, self.path.open("r+b") as file:
            file.seek(self._end)
            plain.reshape(-1).view(torch.uint8).numpy().tofile(file)
            place = (self._end, list(plain.shape), str(plain.dtype).removeprefix("torch."))
            self._end += -(-plain.nbytes // _ALIGNED) * _ALIGNED
        kept = mapped(self.path, place)
        self.places[kept.data_ptr()] = place
        return kept

    def place_of(self, tensor: Tensor) -> Place:
        """Where a tensor is, which is added unless it is one that `add` returned."""
        found = self.places.get(tensor.data_ptr())
        return found if found is not None else self.places[self.add(tensor).data_ptr()]


def mapped(path: Path, place: Place) -> Tensor:
    """The tensor at a place of a file; writing to it changes no file."""
    begin, shape, name = place
    dtype: torch.dtype = getattr(torch, name)
    size = dtype.itemsize * int(np.prod(shape))
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.memmap(path, np.uint8, "c", begin, (size,))).view(dtype).view(shape)


def shared_model(
    folder: Path, make: Callable[[Callable[[Tensor], Tensor]], nn.Module], empty: Callable[[], Any]
) -> nn.Module:
    """A model whose parameters are maps of files in `folder`, which is made first where it is not there yet.

    The caller's random numbers are left as they are. What `make` had to draw beside pretrained weights is in no file:
    it stays on the meta device.

    Args:
        folder: Of this model alone: its name tells it from all others.
        make: The whole model. It may give what it has made of a weight to the function that it is called with, and
            keep what that returns in its place. An attribute `drawn_weights` names those that it had to draw.
        empty: The same model on the meta device.

    Raises:
        TaskError: The file cannot be written.
    """

    def build(private: Path) -> None:
        file = WeightFile(private / "weights")

        def keep(tensor: Tensor) -> Tensor:  # transformers copies what it is given, and a function stays the same one
            return file.add(tensor)

        with torch.random.fork_rng(devices=[]):
            model = make(keep)
        drawn: frozenset[str] = getattr(model, "drawn_weights", frozenset())
        tensors: dict[str, Tensor] = {name: p.data for name, p in model.named_parameters() if name not in drawn}
        tensors |= {name: model.get_buffer(name) for name in model.state_dict().keys() & dict(model.named_buffers())}
        places = {name: file.place_of(tensor) for name, tensor in tensors.items()}
        (private / "places.json").write_text(json.dumps(places))

    try:
        build_once(folder, build)
    except OSError as error:
        raise TaskError(f"model.dtype: the quantized base cannot be kept in {folder}: {error.strerror}.") from error
    model = empty()
    _map(model, folder / "weights", json.loads((folder / "places.json").read_text()))
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
