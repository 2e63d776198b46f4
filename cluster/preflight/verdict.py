"""What pre-flight concludes from what the nodes report: pure functions, numbers in, node numbers and reasons out.

A node is compared with the median of its job, so no figure of any hardware has to be known. Bandwidths are measured
along a ring, where every node has two neighbours: what is slow with both is the node; what is slow with one is a link.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..config.sections import PreflightSpec

Pair = tuple[int, int]
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """The report of one node.

    problems    checks that failed outright, in words
    disk        free bytes where the run is stored, `memory` available bytes; None: could not be asked
    matmul      FLOP/s of each of its devices
    skew        seconds that its clock is ahead of node 0's, give or take `skew_error`, half the round trip
    """

    node: int
    name: str
    problems: tuple[str, ...] = ()
    disk: int | None = None
    memory: int | None = None
    matmul: tuple[float, ...] = ()
    skew: float = 0.0
    skew_error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PreflightTask:
    """This process among all tasks of its job, and what the nodes must pass."""

    rank: int
    local_rank: int
    node: int
    nodes: int
    devices: int
    master: str
    ports: range  # of which one is the store's
    token: str  # of this attempt, and no other
    name: str
    on_gpus: bool
    run_dir: Path
    folder: Path  # of the attempt
    listed: tuple[str, ...]  # nodes, as the engine has listed them
    limits: PreflightSpec

    @property
    def timeout(self) -> float:
        """Seconds."""
        return self.limits.timeout * 3600

    @property
    def device(self) -> str:
        return f"cuda:{self.local_rank}" if self.on_gpus else "cpu"


@dataclass
class Verdict:
    """The result of the pre-flight. `bad`: names; `nodes`: a row each, as in preflight.json."""

    bad: list[str] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bandwidth: float | None = None  # over all nodes, bytes a second
    seconds: float = 0.0
    error: str = ""

    def why(self) -> str:
        faults = [f"{row['name']}: {'; '.join(row['faults'])}" for row in self.nodes if row["faults"]]
        return "pre-flight has found bad nodes: " + (" | ".join(faults) or ", ".join(self.bad))


def faults(report: NodeReport, limits: PreflightSpec) -> list[str]:
    """Why this node fails by itself, compared with nobody; empty: it does not."""
    problems = list(report.problems)
    for what, have, least in (("disk", report.disk, limits.disk), ("memory", report.memory, limits.memory)):
        if have is not None and have < least:
            problems.append(f"{what}: {have / GIB:.2f} GiB, wanted {least / GIB:.2f} GiB (preflight.{what})")
    allowed = limits.clock_skew * 3600
    if abs(report.skew) - report.skew_error > allowed:
        problems.append(f"clock: {report.skew:+.2f} s from node 0's, allowed {allowed:g} s (preflight.clock_skew)")
    return problems


def shortage(reports: Collection[NodeReport], limits: PreflightSpec) -> str:
    """Why no node can help: the run's folder is on storage they share, and every one of them finds it too full."""
    if not reports or any(report.disk is None or report.disk >= limits.disk for report in reports):
        return ""
    most = max(report.disk or 0 for report in reports)
    return (
        f"{most / GIB:.2f} GiB at most are free on each node where the run is stored; wanted "
        f"{limits.disk / GIB:.2f} GiB (preflight.disk). Make room, or give another run directory."
    )


def slow_devices(speeds: Mapping[int, Sequence[float]], share: float) -> dict[int, str]:
    """The nodes with a device below `share` of the median FLOP/s of all devices of the job, and the figures."""
    everyone = [speed for node in speeds.values() for speed in node]
    if not everyone:
        return {}
    usual, faults = median(everyone), {}
    for node, own in speeds.items():
        slow = [(speed, device) for device, speed in enumerate(own) if speed < share * usual]
        if slow:
            speed, device = min(slow)
            faults[node] = (
                f"matmul: device {device} does {speed / 1e9:.4g} GFLOP/s, {speed / usual:.0%} of the median "
                f"{usual / 1e9:.4g}; wanted {share:.0%} (preflight.matmul)"
            )
    return faults


def ring(nodes: Sequence[int]) -> list[list[Pair]]:
    """Rounds of pairs that can be measured at the same time; over all rounds each node meets both its neighbours.

    >>> ring([0, 1, 2])
    [[(0, 1)], [(1, 2)], [(2, 0)]]
    """
    count = len(nodes)
    if count < 2:
        return []
    if count == 2:
        return [[(nodes[0], nodes[1])]]
    edges = [(nodes[i], nodes[(i + 1) % count]) for i in range(count)]
    last = edges[-1:] if count % 2 else []
    even = edges[: count - len(last)]
    return [part for part in (even[0::2], even[1::2], last) if part]


def better(pairs: Mapping[Pair, float]) -> dict[int, float]:
    """Each node's bandwidth: that of its better pair."""
    best: dict[int, float] = {}
    for pair, bandwidth in pairs.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), bandwidth)
    return best


def slow_nodes(pairs: Mapping[Pair, float], share: float) -> set[int]:
    """The nodes of which even the better pair is broken (0), or below `share` of the nodes' median. Not of two nodes:
    what is slow between two tells nothing of either."""
    best = better(pairs)
    if len(best) < 3:
        return set()
    usual = median(best.values())
    return {node for node, bandwidth in best.items() if bandwidth <= 0 or bandwidth < share * usual}


def rematch(suspects: Iterable[int], others: Iterable[int], turn: int = 0) -> list[Pair]:
    """Each suspect with a node that is none, as far as there are any, every `turn` with another: so a node is cleared
    that only stood between two bad ones."""
    partners = sorted(others)
    start = turn % max(1, len(partners))
    return list(zip(sorted(suspects), partners[start:] + partners[:start], strict=False))


def slow_links(pairs: Mapping[Pair, float], share: float, suspects: Collection[int]) -> list[Pair]:
    """Pairs far below the median whose nodes are both in order."""
    if len(pairs) < 3:
        return []
    usual = median(better(pairs).values())
    return [p for p, value in pairs.items() if value < share * usual and not set(p) & set(suspects)]


def absent(nodes: int, reported: Collection[int], alive: Collection[int]) -> set[int]:
    """Return the bad nodes if reports are missing at the timeout; `alive` have written to the run's folder.

    All that are missing; but node 0 itself, if it has no report while most of the others live.
    """
    missing = set(range(nodes)) - set(reported)
    if nodes > 2 and set(reported) <= {0} and 2 * len(missing & set(alive)) > len(missing):
        return {0}
    return missing


def names_of(nodes: int, listed: Sequence[str], known: Mapping[int, str]) -> dict[int, str]:
    """Every node's name: what it has said itself, else its place in the engine's list, else `node-N`."""
    left = [name for name in listed if name not in known.values()]
    missing = [node for node in range(nodes) if node not in known]
    names = dict(known)
    for place, node in enumerate(missing):
        if len(listed) == nodes and listed[node] in left:
            names[node] = listed[node]
        else:
            names[node] = left[place] if len(left) == len(missing) else f"node-{node}"
    return names


def table(rows: Iterable[Mapping[str, object]], seconds: float) -> str:
    """The verdict as text, a line a node; `rows` as in preflight.json."""
    entries = list(rows)
    lines = [("node", "matmul", "all-reduce", "disk", "memory", "clock", "verdict")]
    for row in entries:
        faults = row["faults"]
        assert isinstance(faults, list)
        lines.append((
            str(row["name"]), _figure(row.get("matmul"), 1e9, "GFLOP/s"), _figure(row.get("bandwidth"), 1e6, "MB/s"),
            _figure(row.get("disk"), GIB, "GiB"), _figure(row.get("memory"), GIB, "GiB"),
            _figure(row.get("skew"), 1, "s"), "BAD: " + "; ".join(faults) if faults else "ok",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    text = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
            for line in lines]  # fmt: skip
    return "\n".join([f"[shoestring] pre-flight of {len(entries)} nodes: {seconds:.1f} s", *(f"  {t}" for t in text)])


def _figure(value: object, unit: float, name: str) -> str:
    if isinstance(value, list | tuple):
        value = min(value, default=None)
    if not isinstance(value, int | float):
        return "-"
    return f"{value / unit:.3g} {name}" if abs(value / unit) < 1e4 else f"{value / unit:.0f} {name}"
