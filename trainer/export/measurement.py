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
from .measure_target import MeasureTarget, open_target
from .quality import quality
from .speed import Timing, timings
from .trained import CannotExport

WINDOW = "model"  # the ledger's measurement rows that are of a model, not of a run


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Options of a measurement. shapes: (rows, length) or (rows,); none: the target's own. memory: also peak memory, in
    processes of their own. rounds: of timing."""

    backends: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    memory: bool = True
    rounds: int = 7
    data: str | None = None
    allow_code: bool = False


def measure(wanted: str, options: MeasureOptions, *, baseline: str | None = None) -> dict[str, Any]:
    """Measure `wanted` (see `open_target`), and beside it `baseline`, in the same rounds.

    The answer is flat but for `timings` (by backend and shape), `recall`, and with a baseline `against`. Quality is
    that of the first backend. FLOPs are of one sample of the first shape, forward in torch; None of an ONNX file.
    """
    target = open_target(wanted, data=options.data, allow_code=options.allow_code)
    other = None if baseline is None else open_target(baseline, data=options.data, allow_code=options.allow_code)
    result = _worth(target, options)
    timed = [("", target)] if other is None else [("", target), ("baseline ", other)]
    cases = {f"{mark}{name}": case for mark, each in timed for name, case in _cases(each, options).items()}
    latencies = timings(cases, watts_per_device=_watts(), rounds=options.rounds)
    result |= _of_first(latencies)
    result["timings"] = {name: timing.as_dict() for name, timing in latencies.items()}
    if options.memory:
        result |= _memory(target, options)
    if other is not None:
        result["against"] = against(result, _worth(other, options))
    return result


def against(result: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A model's measurement beside its baseline's: ratios, what pruning is worth, who is forgotten."""
    comparison: dict[str, Any] = {
        "baseline": base["model"], "bytes_ratio": result["bytes"] / base["bytes"],
        "nonzero_ratio": result["nonzero"] / base["parameters"],
    }  # fmt: skip
    if "accuracy" in result and "accuracy" in base:
        dense, total = base["accuracy"], base["parameters"]
        points = [(result["nonzero"], result["accuracy"]), (base["nonzero"], dense)]
        comparison |= {
            "baseline_accuracy": dense, "accuracy_difference": result["accuracy"] - dense,
            "pruned_parameter_efficiency": metrics.pruned_parameter_efficiency(
                result["accuracy"], dense, result["nonzero"], total
            ),
            "parameter_slack": metrics.parameter_slack(points, dense, total),
            "formulas": "Shoestring's own: PPE = (accuracy / dense accuracy) / (non-zero / dense parameters); "
            "slack = 1 - fewest non-zero parameters at 99 % of the dense accuracy / dense parameters",
        }  # fmt: skip
    if "recall" in result and "recall" in base:
        comparison["forgotten"] = metrics.forgotten(result["recall"], base["recall"])
    return comparison


def record(result: dict[str, Any], run_dir: Path | None) -> bool:
    """Append a measurement to the journal of the run it belongs to and bring the ledger up to date; False if none."""
    if run_dir is None:
        return False
    events = run_dir / "events"
    # the last attempt goes on: an attempt of its own would look like training that was resumed
    with Journal(events, rank=0, attempt=max(0, next_attempt(events) - 1)) as journal:
        journal.write("measurement", window=WINDOW, **result)
    Ledger().index(run_dir)
    return True


def parse_shape(text: str) -> tuple[int, ...]:
    """ "8x128" -> (8, 128); "8" -> (8,)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise CannotExport(f"--batch {text}: write rows, or rows x tokens, such as 8 or 1x128.")
    return tuple(map(int, parts))


def _worth(target: MeasureTarget, options: MeasureOptions) -> dict[str, Any]:
    """Everything but time and memory."""
    backend = _backends(target, options)[0]
    result: dict[str, Any] = {
        "model": str(Path(target.name).resolve()) if Path(target.name).exists() else target.name,
        "form": target.form, "backend": backend, "bytes": target.bytes,
        "threads": torch.get_num_threads(), "machine": facts().hardware or platform.machine(),
    }  # fmt: skip
    if target.model is not None:
        flops = forward_flops(target.model, target.batch((1, *_shapes(target, options)[0][1:])))
        result |= parameters(target.model) | {"flops_counted": flops.counted, "flops_realised": flops.realised}
    else:
        assert target.onnx is not None
        result |= onnx_parameters(target.onnx) | {"flops_counted": None, "flops_realised": None}
    if target.trained is not None:
        result |= quality(target.logits_function(backend), target.trained)
        result["data"] = str(target.trained.run_dir.resolve())
        if backend == "onnxruntime" and target.trained.kind == "causal-lm" and target.trained.recipe.data.pack:
            result["note"] = (
                "ONNX graphs take no position ids: packed documents attended to each other while quality was measured"
            )
    return result


def _cases(target: MeasureTarget, options: MeasureOptions) -> dict[str, tuple[Callable[[], Any], int]]:
    cases: dict[str, tuple[Callable[[], Any], int]] = {}
    for backend in _backends(target, options):
        run = target.logits_function(backend)
        for shape in _shapes(target, options):
            batch = target.batch(shape)
            cases[f"{backend} {'x'.join(map(str, shape))}"] = partial(run, batch), shape[0]
    return cases


def _backends(target: MeasureTarget, options: MeasureOptions) -> tuple[str, ...]:
    return options.backends or target.backends()[:1]


def _shapes(target: MeasureTarget, options: MeasureOptions) -> Sequence[tuple[int, ...]]:
    own = target.shape
    for shape in options.shapes:
        if len(shape) != len(own):
            raise CannotExport(f"--batch {'x'.join(map(str, shape))}: this model takes {'x'.join('N' * len(own))}.")
    return options.shapes or (own,)


def _of_first(by_name: dict[str, Timing]) -> dict[str, Any]:
    name, first = next(iter(by_name.items()))
    return {
        "timed": name, "latency_ms": first.p50_ms, "latency_p95_ms": first.p95_ms, "cpu_ms": first.cpu_ms,
        "samples_per_second": first.samples_per_second, "joules_per_sample": first.joules_per_sample,
        "joules_source": first.joules_source,
    }  # fmt: skip


def _memory(target: MeasureTarget, options: MeasureOptions) -> dict[str, int]:
    backend, shape = _backends(target, options)[0], _shapes(target, options)[0]
    return peak_memory(target.name, options.data, backend, shape, options.allow_code)


def _watts() -> float | None:
    from ...cluster.config.hardware import hardware

    name = facts().hardware
    return hardware(name).watts if name else None
