"""How long a call takes, when several are compared: round after round through all of them, so that what else happens on
the machine meets them alike. Wall clock stands beside the processor time of this process, all threads: on a machine
that others use too, the latter is the one to compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from time import perf_counter, process_time
from typing import Any

from ...callbacks.accounting.energy import EnergyMeter

ROUNDS, ROUND_SECONDS, MIN_CALLS = 7, 0.1, 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One call on one batch: milliseconds (median and 95th percentile over all calls; processor time: median over
    rounds), samples per second (median over rounds), joules per sample and where they are from."""

    p50_ms: float
    p95_ms: float
    cpu_ms: float
    samples_per_second: float
    joules_per_sample: float
    joules_source: str
    calls: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Tally:
    latencies: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # per call, by round
    rates: list[float] = field(default_factory=list)
    joules: float = 0.0
    source: str = ""


def timings(
    cases: Mapping[str, tuple[Callable[[], Any], int]],
    *,
    watts_per_device: float | None = None,
    rounds: int = ROUNDS,
    round_seconds: float = ROUND_SECONDS,
) -> dict[str, Timing]:
    """Time several calls against each other. cases: name -> (call, samples that a call computes).

    Each is called twice beforehand, for caches and compilers. Energy is read once before and after each round.
    """
    for call, _ in cases.values():
        call()
        call()
    tallies = {name: _Tally() for name in cases}
    meter = EnergyMeter(watts_per_device, 1)
    for _ in range(rounds):
        for name, (call, samples) in cases.items():
            _round(tallies[name], call, samples, meter, round_seconds)
    return {name: _timing(tallies[name], samples) for name, (_, samples) in cases.items()}


def _round(tally: _Tally, call: Callable[[], Any], samples: int, meter: EnergyMeter, seconds: float) -> None:
    joules, _ = meter.read()
    began, busy, calls = perf_counter(), process_time(), 0
    before = began
    while calls < MIN_CALLS or before - began < seconds:
        call()
        now = perf_counter()
        tally.latencies.append(now - before)
        before, calls = now, calls + 1
    tally.cpu.append((process_time() - busy) / calls)
    tally.rates.append(samples * calls / (before - began))
    after, tally.source = meter.read()
    tally.joules += after - joules


def _timing(tally: _Tally, samples: int) -> Timing:
    return Timing(
        p50_ms=1e3 * statistics.median(tally.latencies), p95_ms=1e3 * percentile(tally.latencies, 0.95),
        cpu_ms=1e3 * statistics.median(tally.cpu), samples_per_second=statistics.median(tally.rates),
        joules_per_sample=tally.joules / (samples * len(tally.latencies)), joules_source=tally.source,
        calls=len(tally.latencies),
    )  # fmt: skip


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
