"""The repeated blocks of any model: find them, and see or replay what they return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn


def blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks: children of one class, at least two, inside one ModuleList or Sequential.

    A child that is a single layer is no block: recomputing it would save nothing.
    """
    found: list[nn.Module] = []
    if isinstance(module, nn.ModuleList | nn.Sequential):
        by_class: dict[type, list[nn.Module]] = {}
        for child in module:
            if any(True for _ in child.children()):
                kind = getattr(child, "_shoestring_original", type(child))  # checkpointing gives each its own class
                by_class.setdefault(kind, []).append(child)
        found = [block for group in by_class.values() if len(group) > 1 for block in group]
    inside = {id(block) for block in found}
    for child in module.children():
        if id(child) not in inside:
            found += blocks(child)
    return found


@contextmanager
def _calling(block: nn.Module, call: Any) -> Iterator[None]:
    """Let `block(...)` be `call(plain, ...)` inside, around everything that hooks on the block do."""
    original = type(block)
    plain = partial(original.__call__, block)

    def instead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(plain, *args, **kwargs)

    block.__class__ = type(original.__name__, (original,), {"__call__": instead})
    try:
        yield
    finally:
        block.__class__ = original


@contextmanager
def recorded(found: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What each block returned in its first call inside; None where it was not called.

    Outputs are taken after all hooks, so also under ZeRO-3 and checkpointing they are what the next block gets.
    """
    outputs: list[Any] = [None] * len(found)

    def recording(index: int) -> Any:
        def call(plain: Any, *args: Any, **kwargs: Any) -> Any:
            out = plain(*args, **kwargs)
            if outputs[index] is None:
                outputs[index] = out
            return out

        return call

    with _all_calling(found, [recording(index) for index in range(len(found))]):
        yield outputs


@contextmanager
def replayed(found: Sequence[nn.Module], outputs: list[Any], last: int, fresh: Sequence[int] = ()) -> Iterator[None]:
    """Compute no block: each returns what it returned before, and those after block `last` return what that one did.

    So the model's own final layers see the hidden state after block `last`, whatever they are. Only the blocks `fresh`
    are computed, and their outputs put into `outputs`.
    """

    def replaying(index: int) -> Any:
        def call(plain: Any, *args: Any, **kwargs: Any) -> Any:
            if index in fresh:
                outputs[index] = plain(*args, **kwargs)
            return outputs[min(index, last)]

        return call

    with _all_calling(found, [replaying(index) for index in range(len(found))]):
        yield


@contextmanager
def _all_calling(found: Sequence[nn.Module], calls: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for block, call in zip(found, calls, strict=True):
            stack.enter_context(_calling(block, call))
        yield


def hidden_of(output: Any) -> Any:
    """The hidden state in what a block returned: the tensor itself or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output
