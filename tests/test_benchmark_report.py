"""What the benchmarks' pages say must follow from the figures: intervals, verdicts, and models of a given size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


report, baselines = load("report"), load("baselines")


def test_interval_is_students() -> None:
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, abs=1e-5)  # two degrees of freedom, deviation 1
    assert report.shown([1.0, 2.0, 3.0], sign=True) == "+2.00 ± 2.48"


@pytest.mark.parametrize(
    ("gaps", "at_least", "said"),
    [
        ([1.0, 2.0, 3.0], 0.0, "interval holds 0"),
        ([4.9, 5.0, 5.1], 0.0, "appears"),
        ([4.9, 5.0, 5.1], 2.0, "appears"),
        ([-4.9, -5.0, -5.1], 0.0, "does NOT appear"),
        ([1.6, 1.7, 1.8], 2.0, "does NOT appear (above, by less than 2)"),
        ([2.0, 2.1, 2.3], 2.0, "appears in the mean, the interval reaches below 2"),
    ],
)
def test_verdict_on_an_ordering(gaps: list[float], at_least: float, said: str) -> None:
    assert report.verdict(gaps, at_least) == said


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([0.1, 0.0, -0.1], "appears"),
        ([2.0, 2.1, 2.2], "does NOT appear"),
        ([-1.0, 0.0, 1.0], "appears in the mean, the interval reaches beyond 1"),
    ],
)
def test_verdict_on_equality(gaps: list[float], said: str) -> None:
    assert report.about_equal(gaps, 1.0) == said


def test_runs_are_made_once_and_kept(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"figure": 7}

    for _ in range(2):
        runs = report.Runs(tmp_path / "runs.jsonl")
        assert runs("a", make) == runs("a", make) == {"figure": 7}
    assert len(made) == 1


def mlp(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@pytest.mark.parametrize("limit", [4_000, 20_000])
def test_widest_model_of_so_many_bytes(limit: int) -> None:
    width = baselines.width_for(mlp, limit)
    assert baselines.written(mlp(width))[0] <= limit < baselines.written(mlp(width + 1))[0]


def test_sparsity_of_so_many_bytes() -> None:
    model, limit = mlp(100), 9_000
    share = baselines.sparsity_for(model, limit)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.view(-1)[: int(share * layer.weight.numel())] = 0.0
    size, served = baselines.written(model, sparse=True)
    assert limit - 64 <= size <= limit  # safetensors aligns its header to 8 bytes
    assert torch.equal(served[0].weight, model[0].weight)
