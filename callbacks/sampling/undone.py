"""A step whose effects are taken back: sums, lists and metrics afterwards hold what they held before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# of a module: what no evaluation changes, or what is not the module's own
_KEPT_APART = frozenset({"_parameters", "_modules", "_trainer", "_fabric"})


@contextmanager
def undone(module: nn.Module, results: MutableMapping[str, Any]) -> Iterator[None]:
    """Inside, a step of `module` may add to whatever it keeps; afterwards that holds what it held before.

    Covers buffers and attributes of all submodules (torchmetrics too): tensors, arrays, lists, dicts, sets, and objects
    of classes that come from where the module's own class does. Parameters are taken to be left alone.

    results: Lightning's, of what has been logged. Names that are logged inside for the first time stay, at their
    initial values: every rank must reduce the same names.
    """
    snapshot = _Snapshot(type(module).__module__.partition(".")[0])
    snapshot.keep(module)
    before = dict(results)
    for metric in before.values():
        snapshot.keep(metric)
    try:
        yield
    finally:
        snapshot.put_back()
        for name, metric in results.items():
            if name not in before:
                _empty(metric)


def _empty(metric: Any) -> None:
    """A logged metric of no sample. Its own `reset` would also leave it out of the reduction over ranks."""
    for state, default in metric._defaults.items():
        held = getattr(metric, state)
        if isinstance(held, Tensor) and isinstance(default, Tensor):
            setattr(metric, state, default.to(held, copy=True))


class _Snapshot:
    """Copies of everything that was kept, each put back into the very object it was taken of."""

    def __init__(self, package: str) -> None:
        self._package = package  # whose objects are looked into
        self._seen: dict[int, Any] = {}  # by id: held, so that no other object gets the same
        self._restore: list[Callable[[], None]] = []

    def keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._keep_array(value, value.detach().clone() if not isinstance(value, nn.Parameter) else None)
        elif isinstance(value, np.ndarray):
            self._keep_array(value, value.copy())
        elif isinstance(value, nn.Module):
            self._seen[id(value)] = value
            for part in value.modules():
                self._seen[id(part)] = part
                self._keep_dict(vars(part), leave=_KEPT_APART)
        elif isinstance(value, dict):
            self._keep_dict(value)
        elif isinstance(value, list | set | deque):
            self._seen[id(value)] = value
            held = list(value)
            self._restore.append(lambda: _refill(value, held))
            for item in held:
                self.keep(item)
        elif isinstance(value, tuple):
            for item in value:
                self.keep(item)
        elif self._is_own(value):
            self._seen[id(value)] = value
            self._keep_dict(vars(value))

    def _is_own(self, value: Any) -> bool:
        """Whether it is an object of a class that comes from where the module's does."""
        own = type(value).__module__.partition(".")[0] == self._package
        return own and hasattr(value, "__dict__") and not isinstance(value, type)

    def put_back(self) -> None:
        with torch.no_grad():
            for restore in self._restore:
                restore()

    def _keep_array(self, value: Any, held: Any) -> None:
        self._seen[id(value)] = value
        if held is not None:
            self._restore.append(lambda: _copy(value, held))

    def _keep_dict(self, value: dict[Any, Any], leave: frozenset[str] = frozenset()) -> None:
        self._seen[id(value)] = value
        held = dict(value)

        def restore() -> None:
            value.clear()
            value.update(held)

        self._restore.append(restore)
        for name, item in held.items():
            if name not in leave:
                self.keep(item)


def _copy(value: Any, held: Any) -> None:
    if value.shape == held.shape:
        value[...] = held


def _refill(value: Any, held: list[Any]) -> None:
    value.clear()
    (value.update if isinstance(value, set) else value.extend)(held)
