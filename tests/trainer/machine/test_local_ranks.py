"""Ranks that are started with the plan: they wait for rank 0, end with it, and leave its errors to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from shoestring.trainer import Budget, Trainer
from shoestring.trainer.machine import local_ranks

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
    done = train(tmp_path, "data.source=missing/*.txt", "model={task: causal-lm, name: minilm}", "goal=null")
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


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "my-notebook", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost",
}  # fmt: skip


def test_a_process_started_by_hand_inside_a_job_of_slurm_starts_its_ranks(tmp_path: Path) -> None:
    done = train(tmp_path, "strategy={name: ddp, devices: 2}", **SLURM)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(("step", "by_hand"), [(None, True), ("1", True), ("2", False)])
def test_tasks_of_srun_are_not_started_by_hand(
    step: str | None, by_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    if step:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", step)
    assert local_ranks.by_hand_in_slurm() == by_hand
    trainer = Trainer(Budget(steps=1), accelerator="cpu", devices=1 if by_hand else 2, ledger=False)
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, LightningEnvironment if by_hand else SLURMEnvironment)


def test_a_port_that_is_taken_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        local_ranks.leave_taken_port()
        assert "MASTER_PORT" not in os.environ and "cannot be used (Address already in use)" in caplog.text


def test_a_port_that_is_free_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(local_ranks._free_port()))
    local_ranks.leave_taken_port()
    assert "MASTER_PORT" in os.environ
