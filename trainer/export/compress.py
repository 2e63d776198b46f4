"""`shoestring compress`: export every candidate, measure it, keep the best that fits the budget.

Quality is that of the run's validation data, which the choice is then made by: the figure of the chosen one flatters it
a little, as any choice by a figure does. Latency is measured for all candidates against each other, in the same rounds.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from ... import ShoestringError
from ...units import BYTES, TIME, UnitError, Vocabulary, quantity
from . import onnx_file, torch_file
from .candidates import Candidate, all_candidates, least_bytes
from .footprint import weight_bytes
from .measure_target import MeasureTarget
from .quality import quality
from .runtimes import LogitsFunction, eager, onnxruntime, sample
from .speed import timings
from .trained import AS_TRAINED, WEIGHTS, CannotExport, Trained
from .write import beside, clear_leftovers, export, whole

MARGIN = 1.1  # tensors may take this much more than the limit before a candidate is given up unwritten
SAMPLES = 1000  # held-out samples that candidates are judged by, at most


class NothingFits(ShoestringError):
    """No candidate meets the budget."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the model: bytes of its weights' files, milliseconds of a call (median). None: as it likes."""

    bytes: float | None = None
    milliseconds: float | None = None

    @classmethod
    def parse(cls, size: str | None, latency: str | None) -> Limits:
        """From "25MB" (decimal; MiB is binary) and "5ms"."""
        if size is None and latency is None:
            raise CannotExport(
                "compress needs --budget-bytes, --max-latency or both: without a limit there is no best candidate."
            )
        return cls(
            bytes=_amount("--budget-bytes", size, BYTES, "25MB"),
            milliseconds=_amount("--max-latency", latency, TIME, "5ms", scale=1000),
        )


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate: what it takes and is worth, or why it cannot be had. quality is accuracy, or minus the loss.

    skipped: it was not written; bytes are those of its tensors, which are too many.
    """

    name: str
    backend: str
    bytes: int | None = None
    latency_ms: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    fits: bool = False
    skipped: bool = False
    problem: str | None = None


Row = tuple[Tried, LogitsFunction | None]  # a line of the table, and what computes it


@dataclass(frozen=True, kw_only=True)
class Compression:
    """The model before, every candidate tried, the best that fits, and where it lies."""

    limits: Limits
    before: tuple[Tried, ...] = ()
    tried: tuple[Tried, ...]
    chosen: str | None
    path: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require_fit(self) -> None:
        """Raise `NothingFits` with the smallest figures there are, where nothing was chosen."""
        if self.chosen is not None:
            return
        exported = [t for t in self.tried if t.bytes is not None]
        if not exported:
            raise NothingFits(
                f"no candidate could be exported: {self.tried[0].problem if self.tried else 'there are none'}"
            )
        small = min(exported, key=lambda t: t.bytes or math.inf)
        said = f"nothing fits; the smallest is {small.name} with {small.bytes:,} bytes"
        if self.limits.milliseconds is not None:
            timed = [t for t in exported if t.latency_ms is not None]
            fast = min(timed, key=lambda t: t.latency_ms or math.inf, default=None)
            said += f", the fastest {fast.name} with {fast.latency_ms:.3g} ms" if fast else ""
        raise NothingFits(f"{said}. Allow more, or train a smaller model.")


def search(
    trained: Trained, limits: Limits, *, before: Trained | None = None, out: Path | None = None,
    shape: Sequence[int] | None = None, candidates: Sequence[Candidate] | None = None,
    report: Callable[[Tried], None] = lambda tried: None,
) -> Compression:  # fmt: skip
    """Try all candidates (default: `all_candidates`) and keep the best that fits in `out` (RUN/export/compressed).

    before: the run that the table begins with, in float32; by default `trained` itself. shape: the batch whose latency
    counts. report: hears of each candidate once it is judged, before it is timed. Nothing is kept where nothing fits.

    A candidate whose tensors alone take more than the limit, by a clear margin, is not written; one whose file takes
    more is not judged. Quality is that of at most `SAMPLES` held-out samples.
    """
    if trained.task.validation is None:
        raise CannotExport(f"{trained.run_dir} has no validation data, so the candidates cannot be compared.")
    out = out or trained.run_dir / "export" / "compressed"
    clear_leftovers(out)
    work = beside(out, "candidates")
    trials = Trials(trained, limits, work)
    candidates = candidates or all_candidates(trained)
    onnx = any(candidate.to == "onnx" for candidate in candidates)
    try:
        first = {row.name: (row, run) for row, run in trials.before(before or trained, onnx)}
        for row, _ in first.values():
            report(row)
        for candidate in candidates:
            report(trials.attempt(candidate))
        table = _timed(trained, {**first, **trials.made}, limits, shape)
        tried = [row for row in table if row.name not in first]
        chosen = best(tried)
        if chosen is not None:
            with whole(out) as folder:
                shutil.copytree(trials.folder(chosen.name), folder, dirs_exist_ok=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Compression(
        limits=limits,
        before=tuple(row for row in table if row.name in first),
        tried=tuple(tried),
        chosen=chosen.name if chosen else None,
        path=None if chosen is None else str(out),
    )


def best(tried: Sequence[Tried]) -> Tried | None:
    """Return, of those that fit, the most accurate, by loss where accuracies are equal, then the smallest."""
    fitting = [t for t in tried if t.fits]
    return min(fitting, key=_rank) if fitting else None


def _rank(tried: Tried) -> tuple[float, float, float]:
    loss = math.inf if tried.loss is None or math.isnan(tried.loss) else tried.loss
    return -(tried.accuracy or 0.0), loss, tried.bytes or math.inf


class Trials:
    """The candidates of one model, each in a folder of its own under `work`; copies and traces are shared.

    made: what became of every candidate, by name, and its runtime for the timing that follows.
    """

    def __init__(self, trained: Trained, limits: Limits, work: Path) -> None:
        self.trained, self.limits, self.work = trained, limits, work
        self.made: dict[str, Row] = {}
        self._changed: tuple[Any, Trained] = (None, trained)
        self._traced: dict[Any, Path] = {}

    def folder(self, name: str) -> Path:
        """Return the folder of the candidate of that name."""
        return self.work / str(list(self.made).index(name))

    def before(self, trained: Trained, onnx: bool) -> Iterator[Row]:
        """A run as it is: in torch and, where `onnx`, in ONNX Runtime, which is faster at the same precision."""
        run = eager(trained.model)
        size = weight_bytes(trained.run_dir / WEIGHTS)
        plain = _worth(Tried(name="before", backend="eager", bytes=size), run, trained)
        yield plain, run
        try:
            path = _trace(trained, self.work) if onnx else None
        except ShoestringError:
            path = None  # nothing to compare with, where there is no such form of the model
        if path is not None:
            if trained is self.trained:
                self._traced[None] = path
            plain = replace(plain, name="before, onnx", backend="onnxruntime", bytes=weight_bytes(path))
            yield plain, onnxruntime(path)

    def attempt(self, candidate: Candidate) -> Tried:
        """Export and judge one candidate, as far as it may fit."""
        blank = Tried(name=candidate.name, backend=candidate.backend)
        self.made[candidate.name] = blank, None
        limit = self.limits.bytes or math.inf
        try:
            changed = self._model(candidate)
            least = least_bytes(changed.model, candidate, changed.ways)
            if least > MARGIN * limit:
                row: Row = replace(blank, bytes=least, skipped=True), None
            else:
                row = self._exported(changed, candidate, blank)
        except ShoestringError as error:
            row = replace(blank, problem=str(error)), None
        self.made[candidate.name] = row
        return row[0]

    def _exported(self, changed: Trained, candidate: Candidate, blank: Tried) -> Row:
        folder, limit = self.folder(candidate.name), self.limits.bytes or math.inf
        traced = None
        if candidate.to == "onnx" and candidate.quantize != AS_TRAINED:  # which rounds the weights before
            if candidate.change not in self._traced:
                self._traced[candidate.change] = _trace(changed, self.work)
            traced = self._traced[candidate.change]
        sparse = candidate.to == "torch"
        export(changed, candidate.to, out=folder, quantize=candidate.quantize, sparse=sparse, traced=traced)
        tried = replace(blank, bytes=weight_bytes(folder))
        if weight_bytes(folder) > limit:
            return tried, None
        if candidate.to == "onnx":
            run = onnxruntime(folder / onnx_file.NAME)
        else:
            run = eager(torch_file.filled(changed.model, folder / torch_file.NAME))
        return _worth(tried, run, self.trained), run

    def _model(self, candidate: Candidate) -> Trained:
        if candidate.quantize == AS_TRAINED:
            return self.trained.as_trained()
        if candidate.change is None:
            return self.trained
        if self._changed[0] is not candidate.change:
            self._changed = candidate.change, self.trained.with_model(candidate.change(self.trained))
        return self._changed[1]


def _trace(trained: Trained, work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"traced-{len(list(work.glob('traced-*.onnx')))}.onnx"
    onnx_file.trace(trained.model, onnx_file.model_inputs(sample(trained, rows=2)), path)
    return path


def _worth(tried: Tried, run: LogitsFunction, trained: Trained) -> Tried:
    worth = quality(run, trained, SAMPLES)
    return replace(tried, loss=worth.get("loss"), accuracy=worth.get("accuracy"))


def _timed(trained: Trained, made: Mapping[str, Row], limits: Limits, shape: Sequence[int] | None) -> list[Tried]:
    measured = MeasureTarget("", trained.run_dir, "run", trained, trained.model)
    batch = measured.batch(shape or measured.shape)
    rows = len(next(iter(batch.values())))
    cases = {name: (partial(run, batch), rows) for name, (_, run) in made.items() if run is not None}
    latencies = timings(cases, rounds=5) if cases else {}
    return [
        _judged(replace(tried, latency_ms=latencies[name].p50_ms) if name in latencies else tried, limits)
        for name, (tried, _) in made.items()
    ]


def _judged(tried: Tried, limits: Limits) -> Tried:
    if tried.bytes is None or tried.latency_ms is None:
        return tried
    fits = tried.bytes <= (limits.bytes or math.inf) and tried.latency_ms <= (limits.milliseconds or math.inf)
    return replace(tried, fits=fits)


def _amount(option: str, text: str | None, units: Vocabulary, example: str, scale: int = 1) -> float | None:
    """What an option says, in base units x `scale`; bytes need no unit."""
    if text is None:
        return None
    try:
        number, base = quantity(text, units)
    except UnitError:
        number = Fraction(0)
    if number <= 0 or not (base or units is BYTES):
        raise CannotExport(f"{option} {text}: write an amount above 0 like {example}; units: {', '.join(units)}.")
    return float(number * scale)
