"""Two runs of the same steps, tensor by tensor: equal within what rounding may do, or the first one that differs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from .witness import Seen

# dtype -> kind -> how far two runs may be apart, relative to the size of what is compared. Sums are taken in
# another order: of gradients in fp32 that is 1e-6, and rounding each to bf16 on its way would be 1e-3. Weights are
# compared by what training has changed of them; adaptive optimizers make rounding larger where gradients are small.
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"initial": 0.0, "loss": 1e-4, "gradient": 1e-4, "weight": 1e-2, "state": 1e-2, "final": 1e-2},
    "bf16": {"initial": 0.0, "loss": 2e-2, "gradient": 6e-2, "weight": 0.3, "state": 0.3, "final": 0.3},
    "fp16": {"initial": 0.0, "loss": 2e-3, "gradient": 1e-2, "weight": 0.1, "state": 0.1, "final": 0.1},
}
FLIPPED = 0.01  # of decisions by a threshold, such as masks: rounding lets them fall otherwise
SMALL = 0.03  # a tensor far smaller than all others is measured by this share of their size
NOISE = 10  # times what is allowed of all gradients: one that is off by so much of its own size is rounding
RESOLVED = (
    1e-3  # times what is allowed: of the size of all gradients, what is smaller is rounding, if it is equal or not
)


@dataclass(frozen=True)
class Difference:
    """How far a value is from what it is compared with.

    Attributes:
        kind: loss | gradient | initial | weight | state | final.
        step: After which it was taken, from 1; 0 before the first.
        name: Of the parameter; empty for losses.
        off: How far, relative to its size; inf where one is missing, not finite or has another shape.
        allowed: How far it may be.
    """

    kind: str
    step: int
    name: str
    off: float
    allowed: float

    @property
    def differs(self) -> bool:
        return not self.off <= self.allowed

    def __str__(self) -> str:
        what = {
            "loss": f"the loss of step {self.step}",
            "gradient": f"the gradient of {self.name} in step {self.step}",
            "initial": f"the weight {self.name} before the first step",
            "weight": f"the weight {self.name} after step {self.step}",
            "state": f"{self.name} after step {self.step}",
            "final": f"the final weight {self.name}",
        }[self.kind]
        if not isfinite(self.off):
            return f"{what} is missing, not finite or of another shape"
        far = f"is off by {self.off:.2g} of its size"
        return f"{what} {far}; allowed is {self.allowed:.2g}"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, "name": self.name, "off": self.off, "allowed": self.allowed}


def compare(seen: Seen, other: Seen, dtype: str) -> list[Difference]:
    """Every value of `seen` beside that of `other`, in the order in which they came to be."""
    allowed = TOLERANCES[dtype]
    steps = len(other.losses)

    def losses(first: int, last: int) -> Iterator[Difference]:
        for step in range(first, last + 1):
            mine = seen.losses[step - 1] if step <= len(seen.losses) else inf
            theirs = other.losses[step - 1]
            yield Difference("loss", step, "", _relative(abs(mine - theirs), abs(theirs)), allowed["loss"])

    def tensors(kind: str, step: int) -> Iterator[Difference]:
        mine, theirs = seen.tensors.get(kind, {}), other.tensors.get(kind, {})
        sizes = {name: _scale(kind, name, theirs[name], other) for name in theirs}
        least = 0.0 if kind in ("initial", "state") else SMALL * _mean(sizes.values())
        for name in [*theirs, *(mine.keys() - theirs.keys())]:
            if name not in noise or kind in ("initial", "gradient"):
                decided = name in theirs and theirs[name].dtype == torch.bool
                off = _off(mine.get(name), theirs.get(name), max(sizes.get(name, 0.0), least))
                yield Difference(kind, step, name, off, FLIPPED if decided else allowed[kind])

    noise = by_rounding(seen, other, dtype)
    return [
        *tensors("initial", 0), *losses(1, 1), *tensors("gradient", 1), *losses(2, steps), *tensors("weight", steps),
        *tensors("state", steps), *tensors("final", steps),
    ]  # fmt: skip


def by_rounding(seen: Seen, other: Seen, dtype: str) -> set[str]:
    """Parameters whose gradients are rounding alone, and what techniques keep of these.

    Beside all others they are next to nothing, and the same; beside themselves they differ, or may do so in the next
    step. An optimizer that adapts to their size makes steps of them that are as large as any.
    """
    mine, theirs = seen.tensors.get("gradient", {}), other.tensors.get("gradient", {})
    sizes, allowed = {name: _size(value) for name, value in theirs.items()}, TOLERANCES[dtype]["gradient"]
    mean, names = _mean(sizes.values()), set()
    least = SMALL * mean
    for name, size in sizes.items():
        equal = _off(mine.get(name), theirs[name], max(size, least)) <= allowed
        apart = _off(mine.get(name), theirs[name], size) > NOISE * allowed
        if equal and (apart or 0 < size < RESOLVED * allowed * mean):
            names.add(name)
    return names | {name for name in other.tensors.get("state", {}) if name.rpartition(" ")[2] in names}


def _scale(kind: str, name: str, value: Tensor, seen: Seen) -> float:
    """The size by which differences from `value` are measured: of weights, that of what training has changed."""
    begun = seen.tensors["initial"].get(name) if kind in ("weight", "final") else None
    return _size(value if begun is None or begun.shape != value.shape else value - begun)


def _off(mine: Tensor | None, theirs: Tensor | None, scale: float) -> float:
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return inf
    if theirs.dtype == torch.bool:
        return float((mine != theirs).float().mean()) if mine.numel() else 0.0
    return _relative(_size(mine.double() - theirs.double()), scale)


def _relative(off: float, scale: float) -> float:
    return 0.0 if off == 0 else inf if scale == 0 or not isfinite(off) else off / scale


def _size(value: Tensor) -> float:
    """The root of the mean square."""
    return float(value.double().square().mean().sqrt()) if value.numel() else 0.0


def _mean(sizes: Iterable[float]) -> float:
    """The root of the mean square of sizes, those of zero aside."""
    some = [size for size in sizes if size > 0]
    return sqrt(sum(size * size for size in some) / len(some)) if some else 0.0
