"""Every optimizer by name, and what it goes with. Adding one is a function, a line here and a test.

Other packages add theirs by the entry point `shoestring.optimizers`; a user's own is `module:attr` in a recipe, with
`--allow-code`. Each of these is an `OptimizerCard`, a `torch.optim.Optimizer` class, or a function of
(named parameters, settings) that returns an optimizer. This module imports no torch, so a plan can ask it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

from .... import ShoestringError
from ....own_code import import_code, is_code
from ....spelling import did_you_mean
from ....strategies import OFFLOADS

LARGEST_SIDE = 10_000  # elements: SOAP does not turn a longer side, whose basis would be larger than the model


@dataclass(frozen=True, kw_only=True)
class OptimizerCard:
    """The facts about an optimizer that a plan and a run need.

    Args:
        make: Builds it from named parameters and the recipe's optimizer section; or the name of such a function in
            `optimizers.py`; or a `torch.optim.Optimizer` class, which gets groups and the learning rate.
        state_bytes: What it keeps of a trained parameter, beside the weight and its gradient; an upper bound.
        matrix_bytes: The same of a hidden matrix's parameters, where that is less.
        whole_bytes: What it keeps beside that of a hidden matrix's parameter, on every rank that has a part of the
            matrix: ZeRO-3 does not share it out.
        side_bytes: The same for each element of a square with a side of such a matrix, for both sides.
        copied_bytes: What its step holds beside that, for each element that it steps at a time; 0 where it is fused.
        copies_of: What it steps at a time: "all" on CUDA, which is how torch's own do, and one parameter on a CPU;
            one "parameter", which under ZeRO is a rank's whole shard; one "matrix" there too; or so many elements.
        whole_parameters: It reads a parameter's shape, which sharding takes away: for single and ddp alone, unless it
            is made of `WholeStepping`, which gathers.
        on_drive: Its states are float32 tensors as long as the weights, two at most: DeepSpeed can put them on a drive.
        averages: Its result is an average of its path, which `AveragedPoint` puts in place; the rate need not fall.
        does: What is particular about it, in one line.
        paper: Its arXiv number, or where else it is described.

    Example:
        >>> OptimizerCard(make="own", whole_parameters=True).strategies
        ['single', 'ddp']
    """

    make: str | Callable[..., Any]
    state_bytes: float = 8.0
    matrix_bytes: float | None = None
    whole_bytes: float = 0.0
    side_bytes: float = 0.0
    copied_bytes: float = 4.0
    copies_of: Literal["all", "parameter", "matrix"] | int = "all"
    whole_parameters: bool = False
    on_drive: bool = False
    averages: bool = False
    does: str = ""
    paper: str = ""

    @property
    def bytes_of_matrices(self) -> float:
        """What it keeps of a hidden matrix's parameter."""
        return self.state_bytes if self.matrix_bytes is None else self.matrix_bytes

    @property
    def strategies(self) -> list[str]:
        """The strategies that it is legal under."""
        return [name for name in OFFLOADS if not self.whole_parameters or name in ("single", "ddp")]


OPTIMIZERS: dict[str, OptimizerCard] = {
    "adamw": OptimizerCard(
        make="adamw", copied_bytes=0, on_drive=True, does="Adam with decay beside the gradient", paper="1711.05101"
    ),
    "adam": OptimizerCard(
        make="adam",
        copied_bytes=0,
        on_drive=True,
        does="steps by the gradient's mean over its root mean square",
        paper="1412.6980",
    ),
    "sgd": OptimizerCard(  # of momentum, which may be off
        make="sgd", state_bytes=4, copied_bytes=0, on_drive=True, does="the gradient, with momentum", paper="1609.04747"
    ),
    "lion": OptimizerCard(
        make="lion",
        state_bytes=4,
        copies_of="parameter",
        on_drive=True,
        does="the sign of a momentum",
        paper="2302.06675",
    ),
    "adamw8bit": OptimizerCard(  # two bytes, and two scales of four bytes in 256 elements; a chunk in float32
        make="adamw8bit",
        state_bytes=2 + 8 / 256,
        copied_bytes=16,
        copies_of=2**20,
        does="AdamW with moments of 8 bits in blocks",
        paper="2110.02861",
    ),
    "adamw4bit": OptimizerCard(  # a byte for both, and two scales of four bytes in 128 elements
        make="adamw4bit",
        state_bytes=1 + 8 / 128,
        copied_bytes=17.1,
        copies_of=2**20,
        does="AdamW with moments of 4 bits in blocks",
        paper="2309.01507",
    ),
    "schedule_free_adamw": OptimizerCard(
        make="schedule_free_adamw",
        averages=True,
        copies_of="parameter",
        does="AdamW that averages its path in place of a falling learning rate",
        paper="2405.15682",
    ),
    "adafactor": OptimizerCard(  # two vectors a matrix
        make="adafactor",
        state_bytes=0,
        copied_bytes=8,
        copies_of="matrix",
        does="the second moment as a row and a column for each matrix",
        paper="1804.04235",
    ),
    "muon": OptimizerCard(  # 4 of hidden matrices, 8 of AdamW's share
        make="muon",
        matrix_bytes=4,
        copied_bytes=20,
        copies_of="matrix",
        does="orthogonal steps for hidden matrices, AdamW for the rest",
        paper="2502.16982",
    ),
    "soap": OptimizerCard(  # the products of a side and their eigenvectors
        make="soap",
        side_bytes=8,
        copied_bytes=16,
        copies_of="matrix",
        does="Adam in the eigenbasis of Shampoo for hidden matrices, AdamW for the rest",
        paper="2409.11321",
    ),
    "galore": OptimizerCard(  # a quarter of AdamW's, and a basis
        make="galore",
        matrix_bytes=0,
        whole_bytes=3,
        copied_bytes=12,
        copies_of="matrix",
        does="AdamW within a gradient's first singular vectors for hidden matrices, AdamW for the rest",
        paper="2403.03507",
    ),
    "apollo": OptimizerCard(
        make="apollo",
        matrix_bytes=0,
        whole_bytes=2,
        copied_bytes=5,
        copies_of="matrix",
        does="gradients scaled as AdamW would in a random projection for hidden matrices, AdamW for the rest",
        paper="2412.05270",
    ),
}


class UnknownOptimizer(ShoestringError):
    """No optimizer of this name. `allowed` lists those there are, `hint` is the way out or empty."""

    def __init__(self, name: str) -> None:
        names = optimizer_names()
        self.allowed, self.hint = " | ".join(names), did_you_mean(name, names)
        super().__init__(f"optimizer.name: found {name}; allowed: {self.allowed}; {self.hint}".rstrip("; "))


def optimizer_names() -> list[str]:
    return [*OPTIMIZERS, *(name for name in _plugins() if name not in OPTIMIZERS)]


def optimizer_card(name: str) -> OptimizerCard:
    """The card of an optimizer: of a name, or of a user's own `module:attr`, which runs the user's code.

    Raises:
        UnknownOptimizer: There is none of this name.
        CannotImport: `module:attr` cannot be imported.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name not in _plugins() and not is_code(name):
        raise UnknownOptimizer(name)
    loaded = import_code(name) if is_code(name) else _plugins()[name].load()
    return loaded if isinstance(loaded, OptimizerCard) else OptimizerCard(make=loaded)


@cache
def _plugins() -> dict[str, Any]:
    """Optimizers of other packages."""
    return {point.name: point for point in entry_points(group="shoestring.optimizers")}
