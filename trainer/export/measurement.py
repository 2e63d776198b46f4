"""`shoestring measure`: what one model costs to run here and what it is worth, and its row in the ledger."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..ledger import Journal, Ledger, next_attempt
from ..machine.facts import facts
from . import metrics
from .footprint import forward_flops, onnx_parameters, parameters, peak_memory
from .quality import quality
from .speed import Timing, timings
from .subject import Subject, open_subject
from .trained import CannotExport

WINDOW = "model"  # the ledger's measurement rows that are of a model, not of a run


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What to measure. shapes: (rows, length) or (rows,); none: the subject's own. memory: also peak memory, in
    processes of their own. rounds: of timing."""

    backends: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    memory: bool = True
    rounds: int = 7
    data: str | None = None
    allow_code: bool = False


def measure(wanted: str, wish: MeasureOptions, *, baseline: str | None = None) -> dict[str, Any]:
    """Measure `wanted` (see `open_subject`), and beside it `baseline`, in the same rounds.

    The answer is flat but for `timings` (by backend and shape), `recall`, and with a baseline `against`. Quality is
    that of the first backend. FLOPs are of one sample of the first shape, forward in torch; None of an ONNX file.
    """
    subject = open_subject(wanted, data=wish.data, allow_code=wish.allow_code)
    other = None if baseline is None else open_subject(baseline, data=wish.data, allow_code=wish.allow_code)
    told = _worth(subject, wish)
    timed = [("", subject)] if other is None else [("", subject), ("baseline ", other)]
    cases = {f"{mark}{name}": case for mark, each in timed for name, case in _cases(each, wish).items()}
    found = timings(cases, watts_per_device=_watts(), rounds=wish.rounds)
    told |= _of_first(found)
    told["timings"] = {name: timing.as_dict() for name, timing in found.items()}
    if wish.memory:
        told |= _memory(subject, wish)
    if other is not None:
        told["against"] = against(told, _worth(other, wish))
    return told


def against(told: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A model's measurement beside its baseline's: ratios, what pruning is worth, who is forgotten."""
    found: dict[str, Any] = {
        "baseline": base["model"], "bytes_ratio": told["bytes"] / base["bytes"],
        "nonzero_ratio": told["nonzero"] / base["parameters"],
    }  # fmt: skip
    if "accuracy" in told and "accuracy" in base:
        dense, total = base["accuracy"], base["parameters"]
        points = [(told["nonzero"], told["accuracy"]), (base["nonzero"], dense)]
        found |= {
            "baseline_accuracy": dense, "accuracy_difference": told["accuracy"] - dense,
            "pruned_parameter_efficiency": metrics.pruned_parameter_efficiency(
                told["accuracy"], dense, told["nonzero"], total
            ),
            "parameter_slack": metrics.parameter_slack(points, dense, total),
            "formulas": "Shoestring's own: PPE = (accuracy / dense accuracy) / (non-zero / dense parameters); "
            "slack = 1 - fewest non-zero parameters at 99 % of the dense accuracy / dense parameters",
        }  # fmt: skip
    if "recall" in told and "recall" in base:
        found["forgotten"] = metrics.forgotten(told["recall"], base["recall"])
    return found


def record(told: dict[str, Any], run_dir: Path | None) -> bool:
    """Append a measurement to the journal of the run it belongs to and bring the ledger up to date; False if none."""
    if run_dir is None:
        return False
    events = run_dir / "events"
    # the last attempt goes on: an attempt of its own would look like training that was resumed
    with Journal(events, rank=0, attempt=max(0, next_attempt(events) - 1)) as journal:
        journal.write("measurement", window=WINDOW, **told)
    Ledger().index(run_dir)
    return True


def parse_shape(text: str) -> tuple[int, ...]:
    """ "8x128" -> (8, 128); "8" -> (8,)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise CannotExport(f"--batch {text}: write rows, or rows x tokens, such as 8 or 1x128.")
    return tuple(map(int, parts))


def _worth(subject: Subject, wish: MeasureOptions) -> dict[str, Any]:
    """Everything but time and memory."""
    backend = _backends(subject, wish)[0]
    told: dict[str, Any] = {
        "model": str(Path(subject.name).resolve()) if Path(subject.name).exists() else subject.name,
        "form": subject.form, "backend": backend, "bytes": subject.bytes,
        "threads": torch.get_num_threads(), "machine": facts().hardware or platform.machine(),
    }  # fmt: skip
    if subject.model is not None:
        flops = forward_flops(subject.model, subject.batch((1, *_shapes(subject, wish)[0][1:])))
        told |= parameters(subject.model) | {"flops_counted": flops.counted, "flops_realised": flops.realised}
    else:
        assert subject.onnx is not None
        told |= onnx_parameters(subject.onnx) | {"flops_counted": None, "flops_realised": None}
    if subject.trained is not None:
        told |= quality(subject.outputs(backend), subject.trained)
        told["data"] = str(subject.trained.run_dir.resolve())
        if backend == "onnxruntime" and subject.trained.kind == "causal-lm" and subject.trained.recipe.data.pack:
            told["note"] = "ONNX graphs take no positions: packed documents saw each other while quality was measured"
    return told


def _cases(subject: Subject, wish: MeasureOptions) -> dict[str, tuple[Callable[[], Any], int]]:
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for backend in _backends(subject, wish):
        run = subject.outputs(backend)
        for shape in _shapes(subject, wish):
            batch = subject.batch(shape)
            found[f"{backend} {'x'.join(map(str, shape))}"] = partial(run, batch), shape[0]
    return found


def _backends(subject: Subject, wish: MeasureOptions) -> tuple[str, ...]:
    return wish.backends or subject.backends()[:1]


def _shapes(subject: Subject, wish: MeasureOptions) -> Sequence[tuple[int, ...]]:
    own = subject.shape
    for shape in wish.shapes:
        if len(shape) != len(own):
            raise CannotExport(f"--batch {'x'.join(map(str, shape))}: this model takes {'x'.join('N' * len(own))}.")
    return wish.shapes or (own,)


def _of_first(found: dict[str, Timing]) -> dict[str, Any]:
    name, first = next(iter(found.items()))
    return {
        "timed": name, "latency_ms": first.p50_ms, "latency_p95_ms": first.p95_ms, "cpu_ms": first.cpu_ms,
        "samples_per_second": first.samples_per_second, "joules_per_sample": first.joules_per_sample,
        "joules_source": first.joules_source,
    }  # fmt: skip


def _memory(subject: Subject, wish: MeasureOptions) -> dict[str, int]:
    backend, shape = _backends(subject, wish)[0], _shapes(subject, wish)[0]
    return peak_memory(subject.name, wish.data, backend, shape, wish.allow_code)


def _watts() -> float | None:
    from ...cluster.config.hardware import hardware

    name = facts().hardware
    return hardware(name).watts if name else None
