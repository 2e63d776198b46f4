"""What a model inside a LightningModule was called with and what it returned, seen without its cooperation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
from torch import Tensor, nn

from ... import ShoestringError


class NoLogits(ShoestringError):
    """No output with logits where one was looked for."""


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def model_name(module: nn.Module, of: str, technique: str) -> str:
    """The dotted name of the submodule whose output has the logits; "" is `module` itself.

    `of` if given. Otherwise, in this order: a LightningModule's `model`; the LightningModule, where it defines
    `forward`; its only child. A module that is no LightningModule is itself. Raises `NoLogits` where none of them is.
    """
    children = [name for name, _ in module.named_children()]
    if of:
        try:
            module.get_submodule(of)
        except AttributeError:
            raise NoLogits(f"{technique}: of={of!r} is no submodule; there are {', '.join(children)}") from None
        return of
    if not isinstance(module, pl.LightningModule):
        return ""
    if isinstance(getattr(module, "model", None), nn.Module):
        return "model"
    if type(module).forward is not pl.LightningModule.forward:
        return ""
    if len(children) == 1:
        return children[0]
    raise NoLogits(
        f"{technique}: {type(module).__name__} has no `model` and no `forward`; "
        f"set `of` to the submodule that returns logits: {', '.join(children) or 'it has none'}"
    )


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[Call]]:
    """The calls of `model` inside, in order.

    A LightningModule's `forward` is often called directly, past all hooks, so there it is the method that is watched;
    elsewhere a hook, which sees what DeepSpeed's own hooks have made of the output.
    """
    calls: list[Call] = []
    if not isinstance(model, pl.LightningModule):
        handle = model.register_forward_hook(
            lambda _, args, kwargs, output: calls.append(Call(args, kwargs, output)), with_kwargs=True
        )
        _watched[model] = _watched.get(model, 0) + 1
        try:
            yield calls
        finally:
            _watched[model] -= 1
            handle.remove()
        return
    before = vars(model).get("forward")  # Lightning leaves one there under DDP
    plain = model.forward

    @wraps(plain)
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        calls.append(Call(args, kwargs, output))
        return output

    model.forward = watched  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before  # type: ignore[method-assign]


_watched: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def is_watched(model: nn.Module) -> bool:
    """Whether something is looking at the calls of this very module: it then has to be called."""
    return _watched.get(model, 0) > 0


def logits_of(output: Any, whose: str) -> Tensor:
    """The logits [B, …, C] in what a model returned: a tensor, or `logits` of a mapping or object."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim >= 2:
        return logits
    raise NoLogits(f"{whose} returned {_what(logits)}; logits are a float tensor [B, …, C], or `logits` of an output")


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
