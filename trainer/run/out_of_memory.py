"""When memory runs out: what filled it beside what was planned, and changes that need less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ... import ShoestringError
from ...exits import FAILURE
from ..monitor.out_of_memory import REST, is_out_of_memory
from ..planning.alternatives import smaller
from ..planning.fitting import gib
from ..planning.planner import Plan

_TERMS = {  # what is counted, and the terms of the plan that it is compared with
    "weights": ("weights", "frozen weights"),
    "master weights": ("master weights", "offloaded master weights"),
    "gradients": ("gradients",),
    "optimizer states": ("optimizer states", "offloaded optimizer states"),
    "activations": ("activations", "a block computed again"),
    "logits": ("logits",),
}


class OutOfMemory(ShoestringError):
    """A device or the host has no memory left for the run. Exits with 1: what is saved can go on with less."""

    exit_code = FAILURE


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Errors that say no more than that memory has run out say what filled it, and what would need less."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = OutOfMemory(_message(error, plan))
        said.told_here = getattr(error, "told_here", True)  # type: ignore[attr-defined]
        raise said from error


def _message(error: Exception, plan: Plan) -> str:
    lines = [f"out of memory: {(str(error) or type(error).__name__).splitlines()[0]}"]
    planned: Mapping[str, float] = plan.predictions.get("memory_terms", {})
    if counted := getattr(error, "held", None):
        lines.append("This rank held, beside what was planned:")
        by_kind = {name: sum(planned.get(term, 0.0) for term in terms) for name, terms in _TERMS.items()}
        fragments = planned.get("fragmentation", 0.0)
        rest = sum(planned.values()) - sum(by_kind.values()) - fragments
        expected = {**by_kind, REST: rest, "fragmentation": fragments}
        lines += [f"  {name}: {gib(value)} (planned {gib(expected[name])})" for name, value in counted.items()]
    else:
        lines.append("It ran out before the first step, while the model and its states were made.")
    if snapshot := getattr(error, "snapshot", None):
        lines.append(f"The allocator's blocks are in {snapshot}: open it at https://pytorch.org/memory_viz")
    if less := smaller(plan):
        lines += ["What needs less, the cheapest first:", *(f"  {each}" for each in less)]
    return "\n".join(lines)
