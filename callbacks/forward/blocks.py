"""The repeated blocks of any model: find them, wrap them, and see or replay what they return.

Several techniques may wrap one block. Whose call is inside whose is declared by `PLACES`, not by who came first: what
watches a block sees what it finally returns, tokens are taken out only of a block that is computed, and what is
recomputed is what was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

Place = Literal["watch", "skip", "tokens", "recompute"]
PLACES: tuple[Place, ...] = get_args(Place)  # from the outside in


def blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks: children of one class, at least two, inside one ModuleList or Sequential.

    A child that is a single layer is no block: recomputing it would save nothing.
    """
    repeated: list[nn.Module] = []
    if isinstance(module, nn.ModuleList | nn.Sequential):
        by_class: dict[type, list[nn.Module]] = {}
        for child in module:
            if any(True for _ in child.children()):
                by_class.setdefault(getattr(child, "_shoestring_original", type(child)), []).append(child)
        repeated = [block for group in by_class.values() if len(group) > 1 for block in group]
    inside = {id(block) for block in repeated}
    for child in module.children():
        if id(child) not in inside:
            repeated += blocks(child)
    return repeated


def wrap_block(block: nn.Module, place: Place, call: Callable[..., Any]) -> Callable[[], None]:
    """Let `block(...)` be `call(inner, ...)`, around everything that hooks on the block do.

    Args:
        block: one of `blocks`. Its class is exchanged for a subclass; names, parameters and hooks stay.
        place: where among the block's other calls, of `PLACES`; within one place the newest is outermost.
        call: gets what is inside it, the block itself at last, and the arguments; returns the block's output.

    Returns:
        What takes `call` away again. Harmless the second time.
    """
    entry = (place, call)
    layers: list[tuple[Place, Callable[..., Any]]] | None = vars(type(block)).get("_shoestring_layers")
    if layers is None:
        layers = []
        block.__class__ = _wrapped_class(type(block), layers)
    # from the inside out: an entry goes outside all of its place, and inside those of places further out
    at = sum(PLACES.index(other) >= PLACES.index(place) for other, _ in layers)
    layers.insert(at, entry)

    def remove() -> None:
        if not any(each is entry for each in layers):
            return
        layers[:] = [each for each in layers if each is not entry]
        if not layers:
            block.__class__ = block._shoestring_original  # type: ignore[assignment]

    return remove


def _wrapped_class(original: type, layers: list[tuple[Place, Callable[..., Any]]]) -> type:
    def instead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = partial(original.__call__, self)  # type: ignore[operator]
        for _, call in layers:
            inner = partial(call, inner)
        return inner(*args, **kwargs)

    own = {"__call__": instead, "_shoestring_original": original, "_shoestring_layers": layers}
    return type(original.__name__, (original,), own)


def unwrap_copies(module: nn.Module) -> None:
    """In a deep copy of a model: leave its blocks to themselves, which share their calls with the model's own."""
    for part in module.modules():
        if (original := getattr(part, "_shoestring_original", None)) is not None:
            part.__class__ = original


def costs_like(block: nn.Module) -> Hashable:
    """The same for blocks that take as many FLOPs as one another, on inputs of one shape."""
    plain: type = getattr(block, "_shoestring_original", type(block))
    places = tuple(place for place, _ in vars(type(block)).get("_shoestring_layers", ()))
    return plain, places, tuple(tuple(getattr(p, "ds_shape", p.shape)) for p in block.parameters())


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Record what each block returned in its first call inside; None where it was not called.

    Outputs are taken after all hooks, so also under ZeRO-3 and checkpointing they are what the next block gets.
    """
    outputs: list[Any] = [None] * len(modules)

    def recording(index: int) -> Any:
        def call(plain: Any, *args: Any, **kwargs: Any) -> Any:
            out = plain(*args, **kwargs)
            if outputs[index] is None:
                outputs[index] = out
            return out

        return call

    with _all_calling(modules, [recording(index) for index in range(len(modules))]):
        yield outputs


@contextmanager
def replayed(modules: Sequence[nn.Module], outputs: list[Any], last: int, fresh: Sequence[int] = ()) -> Iterator[None]:
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

    with _all_calling(modules, [replaying(index) for index in range(len(modules))]):
        yield


@contextmanager
def _all_calling(modules: Sequence[nn.Module], calls: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for block, call in zip(modules, calls, strict=True):
            stack.callback(wrap_block(block, "watch", call))
        yield


def hidden_of(output: Any) -> Any:
    """The hidden state in what a block returned: the tensor itself or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output
