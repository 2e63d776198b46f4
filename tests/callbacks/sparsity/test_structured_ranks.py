"""Structured pruning on several ranks: cut alike, crashed and killed around the cut, and resumed to the bit."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
import structured_ranks
from processes import last_words, run, succeed
from toy import ACCUMULATE, fingerprint

from shoestring.trainer.checkpoint.weights import load_weights

pytestmark = pytest.mark.filterwarnings("ignore")
KILLED = {"before": 2, "at": 3, "after": 5}  # steps; the example cuts when three are done


def of_step(reports: list[dict]) -> list[float]:
    micro = [sum(losses) / len(reports) for losses in zip(*(r["losses"] for r in reports), strict=True)]
    return [sum(micro[i : i + ACCUMULATE]) / ACCUMULATE for i in range(0, len(micro), ACCUMULATE)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    succeed(structured_ranks.main, "single", folder, world=1, folder=folder, timeout=200)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_ranks_cut_alike_and_resume(strategy, alone, tmp_path):
    """Two cuts by Taylor saliency, a group lasso, averages and masks that are cut along."""
    succeed(structured_ranks.main, strategy, tmp_path, world=2, folder=tmp_path, timeout=240)
    by_rank = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for case in structured_ranks.CASES:
        for report in (alone, *by_rank):
            assert "error" not in report[case], report[case]["error"]
        together = of_step([report[case]["whole"] for report in by_rank])
        drift = max(abs(a - b) for a, b in zip(of_step([alone[case]["whole"]]), together, strict=True))
        assert drift < 2e-5, case
        for report in by_rank:
            before, after = report[case]["whole"], report[case]["resumed"]
            assert after["losses"] == before["losses"][after["resumed_from"] * ACCUMULATE :], case
            for part in ("final", "masters", "fragments", "steps", "samples"):
                assert after[part] == before[part], (case, part)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(strategy, ranks) -> a folder of runs: killed at each moment and given again, and the whole one."""

    @cache
    def train(strategy: str, world: int) -> Path:
        folder = tmp_path_factory.mktemp(strategy)
        for name, step in KILLED.items():
            ranks = [random.Random(f"{strategy} {step}").randrange(world)]
            mishap = {"step": step, "part": int(name == "at"), "ranks": ranks, "signal": "SIGKILL"}
            command = (structured_ranks.attempt, folder / name, strategy, world, mishap)
            assert run(*command, world=world, folder=folder)[ranks[0]] == -9, last_words(folder)
        runs = [folder / name for name in (*KILLED, "whole")]
        succeed(structured_ranks.go_on, runs, strategy, world, world=world, folder=folder)
        return folder

    return train


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)])
@pytest.mark.parametrize("moment", KILLED)
def test_killed_around_the_cut_ends_bit_for_bit(moment, strategy, world, killed):
    folder = killed(strategy, world)
    resumed, whole = (fingerprint(load_weights(folder / name / "run" / "final")) for name in (moment, "whole"))
    assert resumed == whole, last_words(folder)
