"""Optimizers that read a matrix as one: on one device and under DDP they have it, under ZeRO it is gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....callbacks.parameters.shards import OF_A_WHOLE, Held
from ....callbacks.parameters.spread import here
from .stepping import CannotStep, Stepping

MATRICES = "matrices"  # of a parameter group: all its parameters have two dimensions and more


@dataclass(frozen=True)
class Part:
    """What this rank steps of one parameter: all of it, or under ZeRO a slice.

    Attributes:
        weight: To be stepped in place; of the parameter's shape, or flat [length], as is the gradient.
        grad: Its gradient.
        shape: Of the whole parameter.
        entries: The optimizer's state.
        stepped: What ZeRO made of all parameters of a group; else the parameter.
        held: Where in it the slice is; None where nothing is cut.
    """

    weight: Tensor
    grad: Tensor
    shape: torch.Size
    entries: dict[str, Any]
    stepped: Tensor
    held: Held | None = None

    @property
    def empty(self) -> bool:
        """Other ranks have it. Collective methods are to be called all the same."""
        return self.held is not None and not self.held.where.length

    @property
    def device(self) -> torch.device:
        """Where the model is; its step may be on the host."""
        return self.weight.device if self.held is None else self.held.device

    def elementwise(self, key: str) -> Tensor:
        """A state of this part's elements, zero at first: split among ranks as the weights are."""
        if key not in self.entries:
            self.entries[key] = torch.zeros_like(self.stepped.data)
        return self.entries[key] if self.held is None else self.held.narrow(self.entries[key])

    def of_whole(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """A small state of the whole parameter: each rank that has a part of it keeps the same one."""
        key = OF_A_WHOLE + key + ("" if self.held is None else f"@{self.held.name}")
        if key not in self.entries:
            self.entries[key] = make()
        return self.entries[key]

    def whole(self, values: Tensor) -> Tensor:
        """The parameter's whole tensor of which `values` are this part. Collective where ranks share it."""
        return values if self.held is None else self.held.whole(values)

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a whole tensor."""
        return whole if self.held is None else self.held.where.cut(whole)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all parts of the parameter. Collective where ranks share it."""
        return value if self.held is None else self.held.total(value)


class WholeStepping(Stepping):
    """An optimizer that says what happens to a part of one parameter, in `update_part`, and can ask for the whole.

    shards: from what ZeRO steps to the slices in it, set by the strategy. Their collectives are called by all ranks in
    the same order, since each steps the same groups.
    """

    shards: Callable[[Tensor], Mapping[str, Held]] | None = None

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of every parameter that `p` has a part of."""
        state["step"] = state.get("step", 0.0) + 1.0
        for part in self._parts(p, grad, state, group):
            self.update_part(part, group)

    def update_slice(self, p: Tensor, group: dict[str, Any]) -> None:
        """One step of a DTensor, whose whole is gathered by its parts."""
        self.update(p, p.grad, self.state[p], group)  # type: ignore[arg-type]

    def update_part(self, part: Part, group: dict[str, Any]) -> None:
        """Step `part.weight` in place."""
        raise NotImplementedError

    def _parts(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Iterator[Part]:
        if self.shards is None:
            if group.get(MATRICES) and p.ndim < 2:
                raise CannotStep(
                    f"{type(self).__name__} needs whole matrices, and the strategy gives it flat shards. Use "
                    "shoestring's own zero1, zero2 or zero3, single or ddp, or optimizer.name adamw."
                )
            yield Part(p, grad, p.shape, state, p)
            return
        flat, flat_grad = here(p), here(grad)
        for held in self.shards(p).values():
            if held.where.length or held.shared:
                yield Part(held.narrow(flat), held.narrow(flat_grad), held.where.shape, state, flat, held)
