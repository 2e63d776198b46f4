"""Ranks that are started with the plan: they wait for rank 0, end with it, and leave its errors to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.trainer.jobs import local_ranks

pytestmark = pytest.mark.filterwarnings("ignore")
TWO = ["strategy={name: zero2, devices: 2}", "budget={steps: 2}", "tracking.ledger=false"]


def train(cwd: Path, *changes: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "shoestring.trainer.cli", "train", "digits", *TWO, *changes, "--run-dir", "run"]
    settings = {**os.environ, "SHOESTRING_HOME": str(cwd / "home"), **env}
    return subprocess.run(line, cwd=cwd, env=settings, capture_output=True, text=True, timeout=240)


def test_two_ranks_train(tmp_path: Path) -> None:
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2
    assert len(list((tmp_path / "run/events").glob("*.jsonl"))) == 2, "each rank has kept its journal"


def test_what_rank_0_finds_wrong_is_said_once_and_nothing_stays(tmp_path: Path) -> None:
    done = train(tmp_path, "data.source=missing/*.txt", "model={task: causal-lm, name: minilm}")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1, done.stderr
    assert "matches no file" in done.stderr and "Traceback" not in done.stderr


def test_a_plan_that_fails_starts_nothing(tmp_path: Path) -> None:
    done = train(tmp_path, "data.batch_size=3")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "multiple of the 2 ranks" in done.stderr


@pytest.mark.parametrize("name", local_ranks.LAUNCHERS)
def test_who_starts_ranks_himself_is_not_helped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    local_ranks.start(devices=2, nodes=1)
    assert not local_ranks._started and dict(os.environ) == before


def test_one_device_and_several_nodes_need_no_ranks_here() -> None:
    local_ranks.start(devices=1, nodes=1)
    local_ranks.start(devices=2, nodes=2)
    assert not local_ranks._started and "LOCAL_RANK" not in os.environ
