"""The ways to run the same few steps: what each changes, and what it is compared with.

reference         one rank, the whole global batch at once
repetition        the same once more
accumulation      one rank, several micro-batches
ranks             ddp, with and without accumulation
sharding          zero1, zero2, zero3 against ddp on as many ranks with as many micro-batches
packing           documents in rows of their own against packed rows, both without dropout
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ....callbacks.accounting.budget import Budget
from ...planning.fitting import CannotFit
from ...planning.planner import Plan, plan
from ..measured import without_traces

if TYPE_CHECKING:
    from ....recipes import Recipe

# a technique that looks at what the loss is made of is told of rows that are not those it has seen
_LOOK_INTO_STEPS = {"loss", "activations", "samples"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the steps.

    Attributes:
        name: In tables and messages.
        axis: What it changes: repetition | accumulation | ranks | sharding | packing; empty for what others are
            compared with.
        against: The name of the variant it must equal.
        strategy: single | ddp | zero1 | zero2 | zero3 | fsdp2.
        ranks: How many take part.
        micro: Samples per rank and forward pass.
        accumulate: Micro-batches in a step.
        offload: As in a recipe.
        apart: Documents of a packed row are given to the model in rows of their own.
        dropout: Masks are drawn; otherwise there is none.
        without: Techniques of the recipe that are left out.
    """

    name: str
    axis: str = ""
    against: str = "reference"
    strategy: str = "single"
    ranks: int = 1
    micro: int
    accumulate: int = 1
    offload: str = "none"
    apart: bool = False
    dropout: bool = True
    without: tuple[str, ...] = ()

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe that runs this way, and leaves nothing behind."""
        strategy = {"name": self.strategy, "devices": self.ranks, "nodes": 1, "offload": self.offload}
        changed = {
            "strategy": recipe.strategy.model_copy(update=strategy),
            "data": recipe.data.model_copy(update={"micro_batch_size": self.micro}),
            "techniques": tuple(t for t in recipe.techniques if t.name not in self.without),
        }
        return without_traces(recipe).model_copy(update=changed)

    def plan(self, recipe: Recipe, steps: int) -> Plan:
        """How it is run; raises as `plan` does where that is not legal."""
        return replace(plan(self.of(recipe)), budget=Budget(steps=steps))


def reference(recipe: Recipe) -> Variant:
    """One rank, and the whole global batch at once; where memory has no room, as large a part as fits.

    Raises:
        CannotFit: Not even one sample does.
    """
    total = recipe.data.batch_size
    for micro in (n for n in range(total, 0, -1) if total % n == 0):
        first = Variant(name="reference", micro=micro, accumulate=total // micro)
        try:
            first.plan(recipe, 1)
            break
        except CannotFit:
            if micro == 1:
                raise
    return first


def alone(first: Variant) -> list[Variant]:
    """The variants on one rank."""
    parts = _smallest_factor(first.micro)
    same = replace(first, name="reference again", axis="repetition")
    if parts == 1:
        return [same]
    micro, accumulate = first.micro // parts, first.accumulate * parts
    return [same, replace(first, name=f"1 rank, {accumulate} accumulated", axis="accumulation", micro=micro,
                          accumulate=accumulate)]  # fmt: skip


def packing(first: Variant, recipe: Recipe, made: Plan) -> list[Variant]:
    """Packed rows, and their documents apart."""
    cards = {type(t).card.name: type(t).card for t in made.declared}
    looks = {name for name, card in cards.items() if _LOOK_INTO_STEPS & {*card.reads, *card.writes}}
    without = tuple(t.name for t in recipe.techniques if t.name in looks)
    packed = replace(first, name="packed", dropout=False, without=without)
    return [packed, replace(packed, name="documents apart", axis="packing", against=packed.name, apart=True)]


def together(made: Plan, ranks: int) -> list[Variant]:
    """The variants on several ranks: with the fewest micro-batches, with some more, sharded, and as planned."""
    total, offload = made.recipe.data.batch_size, made.offload
    own = total // ranks
    some = _smallest_factor(own)
    chosen = [_ddp(ranks, own, 1)]
    if some > 1:
        chosen.append(_ddp(ranks, own // some, some))
    for stage in ("zero1", "zero2", "zero3"):
        chosen.append(_sharded(stage, ranks, own // some, some))
    planned = (made.micro_batch, own // made.micro_batch if own % made.micro_batch == 0 else 0)
    if made.strategy != "single" and planned[1]:
        if planned[1] not in (1, some):
            chosen.append(_ddp(ranks, *planned))
        last = _ddp(ranks, *planned) if made.strategy == "ddp" else _sharded(made.strategy, ranks, *planned, offload)
        if last not in chosen:
            chosen.append(last)
    return chosen


def _ddp(ranks: int, micro: int, accumulate: int) -> Variant:
    return Variant(
        name=_called("ddp", ranks, accumulate), axis="ranks", strategy="ddp", ranks=ranks, micro=micro,
        accumulate=accumulate,
    )  # fmt: skip


def _sharded(stage: str, ranks: int, micro: int, accumulate: int, offload: str = "none") -> Variant:
    name = _called(stage, ranks, accumulate) + (f", {offload} offloaded" if offload != "none" else "")
    return Variant(
        name=name, axis="sharding", against=_called("ddp", ranks, accumulate), strategy=stage, ranks=ranks,
        micro=micro, accumulate=accumulate, offload=offload,
    )  # fmt: skip


def _called(strategy: str, ranks: int, accumulate: int) -> str:
    return f"{strategy}, {ranks} ranks" + (f", {accumulate} accumulated" if accumulate > 1 else "")


def _smallest_factor(number: int) -> int:
    """The smallest factor above 1; 1 where there is none."""
    return next((n for n in range(2, number + 1) if number % n == 0), 1)
