"""`shoestring compress`: export every candidate, measure it, keep the best that fits the budget.

Quality is that of the run's validation data, which the choice is then made by: the figure of the chosen one flatters it
a little, as any choice by a figure does. Latency is measured for all candidates against each other, in the same rounds.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ... import ShoestringError
from . import onnx_file, torch_file
from .candidates import Candidate, all_candidates
from .footprint import weight_bytes
from .quality import quality
from .runtimes import Outputs, eager, onnxruntime
from .speed import timings
from .subject import Subject
from .trained import CannotExport, Trained
from .write import beside, clear_leftovers, export, whole

SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class NothingFits(ShoestringError):
    """No candidate meets the budget."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model may take: bytes of its weights' files, milliseconds of a call (median). None: as it likes."""

    bytes: float | None = None
    milliseconds: float | None = None

    @classmethod
    def parse(cls, size: str | None, latency: str | None) -> Limits:
        """From "25MB" (decimal; MiB is binary) and "5ms"."""
        if size is None and latency is None:
            raise CannotExport("compress needs --budget-bytes, --max-latency or both: without a limit nothing is best.")
        return cls(
            bytes=_amount("--budget-bytes", size, SIZES, "25MB"),
            milliseconds=_amount("--max-latency", latency, TIMES, "5ms"),
        )


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate: what it takes and is worth, or why it cannot be had. quality is accuracy, or minus the loss."""

    name: str
    backend: str
    bytes: int | None = None
    latency_ms: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    fits: bool = False
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Every candidate tried, the best that fits, and where it lies."""

    limits: Limits
    tried: tuple[Tried, ...]
    chosen: str | None
    path: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require_fit(self) -> None:
        """Raise `NothingFits` with the smallest figures there are, where nothing was chosen."""
        if self.chosen is not None:
            return
        found = [t for t in self.tried if t.bytes is not None]
        if not found:
            raise NothingFits(
                f"no candidate could be made: {self.tried[0].problem if self.tried else 'there are none'}"
            )
        small = min(found, key=lambda t: t.bytes or math.inf)
        said = f"nothing fits; the smallest is {small.name} with {small.bytes:,} bytes"
        if self.limits.milliseconds is not None:
            fast = min(found, key=lambda t: t.latency_ms or math.inf)
            said += f", the fastest {fast.name} with {fast.latency_ms:.3g} ms"
        raise NothingFits(f"{said}. Allow more, or train a smaller model.")


def search(
    trained: Trained, limits: Limits, *, out: Path | None = None, shape: Sequence[int] | None = None,
    candidates: Sequence[Candidate] | None = None, report: Callable[[Tried], None] = lambda tried: None,
) -> Compression:  # fmt: skip
    """Try all candidates (default: `all_candidates`) and keep the best that fits in `out` (RUN/export/compressed).

    shape: the batch whose latency counts. report: hears of each candidate once it is judged, before it is timed.
    Nothing is kept where nothing fits.
    """
    if trained.task.validation is None:
        raise CannotExport(f"{trained.run_dir} held out no validation data: nothing says which candidate is best.")
    out = out or trained.run_dir / "export" / "compressed"
    clear_leftovers(out)
    work = beside(out, "candidates")
    try:
        made = {}
        for number, candidate in enumerate(candidates or all_candidates()):
            made[candidate] = _try(trained, candidate, work / str(number))
            report(made[candidate][0])
        tried = _timed(trained, made, limits, shape)
        chosen = best(tried)
        if chosen is not None:
            number = next(n for n, candidate in enumerate(made) if candidate.name == chosen.name)
            with whole(out) as folder:
                shutil.copytree(work / str(number), folder, dirs_exist_ok=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Compression(
        limits=limits,
        tried=tuple(tried),
        chosen=chosen.name if chosen else None,
        path=None if chosen is None else str(out),
    )


def best(tried: Sequence[Tried]) -> Tried | None:
    """Of those that fit: the most accurate, by loss where accuracies are equal, then the smallest."""
    fitting = [t for t in tried if t.fits]
    return min(fitting, key=_rank) if fitting else None


def _rank(tried: Tried) -> tuple[float, float, float]:
    loss = math.inf if tried.loss is None or math.isnan(tried.loss) else tried.loss
    return -(tried.accuracy or 0.0), loss, tried.bytes or math.inf


def _changed(trained: Trained, candidate: Candidate) -> Trained:
    return trained if candidate.change is None else trained.with_model(candidate.change(trained))


def _try(trained: Trained, candidate: Candidate, folder: Path) -> tuple[Tried, Outputs | None]:
    """Export and judge one candidate; its runtime, for the timing that follows."""
    try:
        changed = _changed(trained, candidate)
        sparse = candidate.to == "torch"
        export(changed, candidate.to, out=folder, quantize=candidate.quantize, sparse=sparse)
    except ShoestringError as error:
        return Tried(name=candidate.name, backend=candidate.backend, problem=str(error)), None
    if candidate.to == "onnx":
        run = onnxruntime(folder / onnx_file.NAME)
    else:
        run = eager(torch_file.filled(changed.model, folder / torch_file.NAME))
    worth = quality(run, trained)
    return Tried(
        name=candidate.name, backend=candidate.backend, bytes=weight_bytes(folder), loss=worth.get("loss"),
        accuracy=worth.get("accuracy"),
    ), run  # fmt: skip


def _timed(
    trained: Trained, made: dict[Candidate, tuple[Tried, Outputs | None]], limits: Limits, shape: Sequence[int] | None
) -> list[Tried]:
    subject = Subject("", trained.run_dir, "run", trained, trained.model)
    batch = subject.batch(shape or subject.shape)
    rows = len(next(iter(batch.values())))
    cases = {tried.name: (partial(run, batch), rows) for tried, run in made.values() if run is not None}
    found = timings(cases, rounds=5) if cases else {}
    return [
        _judged(replace(tried, latency_ms=found[tried.name].p50_ms) if tried.name in found else tried, limits)
        for tried, _ in made.values()
    ]


def _judged(tried: Tried, limits: Limits) -> Tried:
    if tried.problem is not None or tried.bytes is None or tried.latency_ms is None:
        return tried
    fits = tried.bytes <= (limits.bytes or math.inf) and tried.latency_ms <= (limits.milliseconds or math.inf)
    return replace(tried, fits=fits)


def _amount(option: str, text: str | None, units: dict[str, float] | dict[str, int], example: str) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = (match[2] or "b") if match else ""
    if match is None or unit not in units or not float(match[1]):
        raise CannotExport(f"{option} {text}: write an amount above 0 like {example}; units: {', '.join(units)}.")
    return float(match[1]) * units[unit]
