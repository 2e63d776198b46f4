"""`verify(recipe)`: run a few steps on one rank and in the ways the recipe is really run, and say where they differ.

    rank 0     reference, repetition, accumulation, packing ── start ── ddp, zero1, zero2, zero3 ── verdict
    others                                                     import ─ ddp, zero1, zero2, zero3

A difference is a fault of the recipe's model, of a technique, or of ours. Nothing is kept of these runs.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING

from .... import ShoestringError
from ...machine import local_ranks
from ...machine.facts import is_first
from ...planning.planner import Plan, plan
from ..fit import fit
from .variants import Variant, alone, packing, reference, together
from .verdict import Outcome, Verdict

if TYPE_CHECKING:
    from ....recipes import Recipe
    from .compare import Difference
    from .witness import Seen

STEPS = 4
FOLDER = "SHOESTRING_VERIFY_FOLDER"  # where all ranks keep what they need for a while
SPLITS = ("accumulation", "ranks")


class CannotVerify(ShoestringError):
    """The recipe's batches cannot be split in other ways."""


def verify(
    recipe: Recipe, *, ranks: int | None = None, steps: int = STEPS, say: Callable[[str], None] = lambda name: None
) -> Verdict | None:
    """Run a few steps of a recipe in all legal ways and compare them with one rank that sees the whole batch at once.

    Args:
        recipe: What to run: its own model, data and techniques.
        ranks: How many at most; by default as many as planned, at least two. 1 starts none.
        steps: Of each variant. The data end amid the third, so that four hold the last, partial batch of an epoch.
        say: Hears the name of each variant before it runs.

    Returns:
        The verdict on rank 0. Other ranks, which are this process's command once more, end with None.

    Raises:
        CannotVerify: The batches cannot be split.
    """
    made = plan(recipe)
    count = _ranks(made, ranks)
    run = Runs(recipe, made, steps, say)
    with _folder() as run.folder:
        if is_first():
            run.begin()
            run.on_one_rank()
        if count > 1:
            local_ranks.start(count, 1)
            run.on_ranks(count)
    return run.verdict() if is_first() else None


def _ranks(made: Plan, wanted: int | None) -> int:
    """How many ranks to start; the global batch must divide among them."""
    total = made.recipe.data.batch_size
    count = wanted or max(2, made.devices)
    if total % count == 0:
        return count
    able = [n for n in range(2, total + 1) if total % n == 0]
    if wanted is None and able:
        return able[0]
    raise CannotVerify(
        f"data.batch_size {total} does not divide among {count} ranks. Use --ranks {able[0] if able else 1}."
    )


@contextmanager
def _folder() -> Iterator[Path]:
    """The folder that all ranks share: rank 0 makes it, and takes it away."""
    if FOLDER in os.environ:
        yield Path(os.environ[FOLDER])
        return
    if any(name in os.environ for name in local_ranks.LAUNCHERS):
        raise CannotVerify("verify starts its ranks itself, on one machine: run it without a launcher.")
    with TemporaryDirectory(prefix="shoestring-verify-", ignore_cleanup_errors=True) as home:
        os.environ[FOLDER] = home
        try:
            yield Path(home)
        finally:
            del os.environ[FOLDER]


class Runs:
    """Runs variants one after another, in this process, and compares each with the one before that it must equal."""

    def __init__(self, recipe: Recipe, made: Plan, steps: int, say: Callable[[str], None]) -> None:
        self.recipe, self.made, self.steps, self.say = recipe, made, steps, say
        self.folder = Path()
        self.outcomes: list[Outcome] = []
        self.notes: list[str] = []
        self._seen: dict[str, Seen] = {}
        self._rounding: set[str] = set()  # weights that were not compared
        self._ended = False

    def begin(self) -> None:
        """The reference."""
        first = reference(self.recipe)
        self._seen[first.name] = self._run(first, first.plan(self.recipe, self.steps))
        self._note(self._seen[first.name])

    def on_one_rank(self) -> None:
        """What needs no other rank."""
        first, seen = reference(self.recipe), self._seen["reference"]
        for variant in alone(first):
            self.take(variant)
        if seen.packed:
            packed, apart = packing(first, self.recipe, self.made)
            if packed.without:
                self.notes.append(f"packing is compared without {', '.join(packed.without)}: they look into each row")
            if seen.dropout or packed.without:
                self.take(packed)
            else:
                self._seen[packed.name] = seen
            self.take(apart)
        elif self.recipe.data.pack and self.recipe.model.task == "causal-lm":
            mixed = self.recipe.data.args.get("pack_isolation") is False
            why = "by data.args.pack_isolation documents see each other" if mixed else "no row here holds two documents"
            self.notes.append(f"packing is not compared: {why}")

    def on_ranks(self, count: int, names: Collection[str] | None = None) -> None:
        """On every rank: what needs several, all of it or the variants of some names."""
        for variant in together(self.made, count):
            if names is None or variant.name in names:
                self.take(variant)

    def take(self, variant: Variant) -> None:
        """Run a variant and compare it. One that is not legal is said to be so."""
        outcome, began = Outcome(variant, self._against(variant)), monotonic()
        if variant.axis:
            self.outcomes.append(outcome)
        if self._ended:
            outcome.status, outcome.why = "not compared", "another one has failed, and ranks may have lost one another"
            return
        try:
            made = variant.plan(self.recipe, self.steps)
        except ShoestringError as error:
            outcome.status, outcome.why = "refused", str(error)
            return
        if is_first():
            self.say(variant.name)
        try:
            with _quietly():
                seen = self._run(variant, made)
        except Exception as error:
            own = isinstance(error, ShoestringError)
            if not own and not is_first():
                raise
            outcome.status, outcome.why = "failed", str(error) if own else f"{type(error).__name__}: {error}"
            self._ended = not own and variant.ranks > 1
            return
        finally:
            outcome.seconds = monotonic() - began
        if not is_first():
            return
        if not variant.axis or variant.strategy == "ddp":
            self._seen[variant.name] = seen
        if variant.axis:
            self._compare(outcome, seen)

    def _against(self, variant: Variant) -> str:
        """What to compare with: of two ways that differ, which one is wrong only the reference can tell."""
        wrong = any(o.variant.name == variant.against and o.status == "differs" for o in self.outcomes)
        lacking = variant.axis == "sharding" and variant.against not in self._seen
        return "reference" if wrong or lacking else variant.against

    def _compare(self, outcome: Outcome, seen: Seen) -> None:
        from .compare import by_rounding, compare

        base = self._seen.get(outcome.against)
        if base is None:
            outcome.status, outcome.why = "not compared", f"{outcome.against} did not run"
            return
        axis = outcome.variant.axis
        split = axis in SPLITS or (axis == "sharding" and outcome.against == "reference")
        if split and (why := base.by_batch or seen.by_batch):
            outcome.status, outcome.why = "not compared", why
            return
        differences = compare(seen, base, self.made.precision)
        self._rounding |= by_rounding(seen, base, self.made.precision) & base.tensors["weight"].keys()
        largest: dict[str, Difference] = {}
        for difference in differences:
            if difference.kind not in largest or difference.off > largest[difference.kind].off:
                largest[difference.kind] = difference
        outcome.largest = list(largest.values())
        differing = [difference for difference in differences if difference.differs]
        outcome.differing = len(differing)
        if differing:
            outcome.status, outcome.first = "differs", differing[0]

    def _run(self, variant: Variant, made: Plan) -> Seen:
        from .witness import Witness

        witness = Witness(variant, self.recipe.seed)
        home = self.folder / variant.name.replace(" ", "-").replace(",", "")
        fit(made, run_dir=home, callbacks=[witness])
        gc.collect()
        return witness.seen

    def _note(self, seen: Seen) -> None:
        if seen.dropout:
            self.notes.append("dropout masks are drawn for each sample here, so that every split has the same")
        if seen.attention_dropout:
            self.notes.append("dropout of attention probabilities is off: its kernel draws them for a batch as a whole")

    def verdict(self) -> Verdict:
        notes = list(self.notes)
        if self._rounding:
            notes.append(f"weights whose gradient is rounding alone are not compared: {_some(sorted(self._rounding))}")
        return Verdict(self.recipe.name, self.made.precision, self.steps, self.outcomes, notes)


@contextmanager
def _quietly() -> Iterator[None]:
    """The reference has said what there is to say."""
    log = logging.getLogger("shoestring")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
