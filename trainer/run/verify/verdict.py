"""What has come of the variants of a recipe, one by one and together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .variants import Variant

if TYPE_CHECKING:
    from .compare import Difference


@dataclass
class Outcome:
    """What has come of one variant.

    Attributes:
        variant: Which.
        against: What it has been compared with: the reference, where the variant that it is to equal differs itself.
        status: equal | differs | refused (it is not legal, `why` says so) | not compared | failed.
        first: The first value that differs.
        largest: The largest difference of each kind.
        differing: How many values differ.
        seconds: It took.
        why: Where it was not compared.
    """

    variant: Variant
    against: str
    status: Literal["equal", "differs", "refused", "not compared", "failed"] = "equal"
    first: Difference | None = None
    largest: list[Difference] = field(default_factory=list)
    differing: int = 0
    seconds: float = 0.0
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        v = self.variant
        return {
            "variant": v.name, "axis": v.axis, "against": self.against, "strategy": v.strategy, "ranks": v.ranks,
            "micro_batch": v.micro, "accumulate": v.accumulate, "without": list(v.without), "status": self.status,
            "why": self.why, "first": self.first and self.first.as_dict(), "differing": self.differing,
            "largest": [difference.as_dict() for difference in self.largest], "seconds": self.seconds,
        }  # fmt: skip


@dataclass
class Verdict:
    """What has come of all variants.

    Attributes:
        recipe: Its name.
        dtype: What was computed in, and decides what is allowed.
        steps: How many each variant took.
        outcomes: In the order in which they ran; without those that others are compared with.
        notes: What could not be compared, and what was done to compare the rest.
    """

    recipe: str
    dtype: str
    steps: int
    outcomes: list[Outcome]
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        """A sentence for each axis along which the runs differ: the first variant that does, and its first value."""
        by_axis: dict[str, str] = {}
        for outcome in self.outcomes:
            axis, name = outcome.variant.axis, outcome.variant.name
            if outcome.status == "differs":
                more = f" ({outcome.differing - 1} more differ)" if outcome.differing > 1 else ""
                by_axis.setdefault(axis, f"{axis}: {name} is not {outcome.against}: {outcome.first}{more}")
            elif outcome.status == "failed":
                by_axis.setdefault(axis, f"{axis}: {name} failed: {outcome.why}")
        return list(by_axis.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "recipe": self.recipe, "dtype": self.dtype, "steps": self.steps, "equal": not self.problems,
            "problems": self.problems, "notes": self.notes, "variants": [o.as_dict() for o in self.outcomes],
        }  # fmt: skip
