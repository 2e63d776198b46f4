"""Elastic by save and requeue: a run goes on with other numbers of tasks, and every step sees what it would have."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recorded_samples
import torch

from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.ledger import read

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]
STEPS, BATCH = 60, 32
WAIT = 240.0  # seconds for anything, on a machine that is busy with other things
RECIPE = f"""
model: {{task: "recorded_samples:Recorded"}}
data: {{source: "recorded_samples:data", validation: 0, batch_size: {BATCH}}}
budget: {{steps: {STEPS}}}
precision: fp32
checkpoint: {{every: "5 steps"}}
"""
CLUSTER = """
name: here
engine: local
devices_per_node: 4
hardware: cpu
price: {kind: own}
limits: {hours: 1}
"""


class Here:
    """A folder with a recipe and a cluster file, and the command line in it."""

    def __init__(self, folder: Path, cluster: str = CLUSTER) -> None:
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "cluster.yaml").write_text(cluster)
        (folder / "recorded_samples.py").write_text(Path(recorded_samples.__file__).read_text())

    def __call__(self, *words: object, records: str = "") -> subprocess.CompletedProcess[str]:
        (self.folder / records).mkdir(exist_ok=True)
        environ = {**os.environ, "RECORDS": str(self.folder / records), "SHOESTRING_HOME": str(self.folder / "home")}
        return subprocess.run([sys.executable, "-m", "shoestring.trainer.cli", *map(str, words)], cwd=self.folder,
                              env=environ, capture_output=True, text=True, timeout=WAIT)  # fmt: skip

    def ok(self, *words: object, **options: str) -> str:
        done = self(*words, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def launch(self, *words: object, records: str = "") -> str:
        """The id of a job of the run in `run`."""
        output = self.ok("launch", "recipe.yaml", *words, "--allow-code", "--cluster", "cluster.yaml", "--run-dir",
                       self.folder / "run", "--json", records=records)  # fmt: skip
        return json.loads(output)["id"]

    def until(self, job: str, state: str) -> dict[str, Any]:
        def reached() -> Any:
            status = json.loads(self.ok("jobs", job, "--json"))
            assert status["state"] in (state, "submitted", "queued", "running", "requeued"), self.log(job)
            return status if status["state"] == state else None

        return self.wait_for(reached, job)

    def wait_for(self, what: Callable[[], Any], job: str) -> Any:
        end = time.monotonic() + WAIT
        while not (value := what()):
            assert time.monotonic() < end, self.log(job)
            time.sleep(0.3)
        return value

    def log(self, job: str) -> str:
        return (self.folder / "run" / "jobs" / job / "output.log").read_text(errors="replace")[-8000:]

    def events(self, kind: str) -> list[dict[str, Any]]:
        rows = read(self.folder / "run" / "events", rank=0)
        return [dict(row.fields) for row in rows if row.fields.get("event") == kind]


def recorded(folder: Path) -> dict[int, dict[int, float]]:
    """The loss of every sample of every step, over all ranks; of a step done twice, whatever was told last."""
    steps: dict[int, dict[int, float]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            step, samples, losses = json.loads(line)
            steps.setdefault(step, {}).update(zip(samples, losses, strict=True))
    return steps


def test_four_tasks_then_two_end_as_one_that_nobody_disturbed(tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.ok("train", "recipe.yaml", "--allow-code", "--run-dir", tmp_path / "whole", records="records-whole")
    # launched with what does not fit: refused here and now, and nothing is left of it
    refused = here("launch", "recipe.yaml", "strategy.devices=3", "--allow-code", "--cluster", "cluster.yaml")
    assert refused.returncode == 2 and "data.batch_size: found 32; allowed: a multiple of 3" in refused.stderr
    assert not (tmp_path / "runs").exists()

    job = here.launch(records="records")  # a job inherits the variables of who launches it
    here.wait_for(lambda: len(recorded(tmp_path / "records")) > 8, job)
    here.ok("cancel", job)
    first = here.until(job, "cancelled")
    assert [attempt["code"] for attempt in first["attempts"]] == [85]
    again = here.launch("strategy.devices=2", records="records")
    here.until(again, "finished")

    (resumed,) = here.events("resume")
    assert 8 < resumed["step"] < STEPS and resumed["world_size"] == 2
    assert here.events("start")[0]["world_size"] == 4
    parts = {path.name[0] for path in (tmp_path / "records").glob("*.jsonl")}
    assert parts == {"4", "2"}
    whole, in_parts = recorded(tmp_path / "records-whole"), recorded(tmp_path / "records")
    assert sorted(whole) == sorted(in_parts) == list(range(STEPS))
    for step in range(STEPS):
        assert len(whole[step]) == BATCH and set(in_parts[step]) == set(whole[step]), step
        assert in_parts[step] == pytest.approx(whole[step], rel=1e-3, abs=1e-5), step
    ends = [load_weights(tmp_path / name / "final") for name in ("whole", "run")]
    assert ends[0].keys() == ends[1].keys()
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-3, atol=1e-5)
    # the nodes were checked before each attempt, and the ledger has it
    assert "pre-flight of 1 nodes" in here.log(again)
    shown = json.loads(here.ok("runs", "show", json.loads((tmp_path / "run" / "run.json").read_text())["id"], "--json"))
    checks = [row for row in shown["measurements"] if row["window"] == "preflight" and "name" in row]
    assert [row["name"] for row in checks] == [socket.gethostname()] * 2


def test_a_bad_machine_ends_the_job_since_there_is_no_other(tmp_path: Path) -> None:
    drill = f"environment: {{variables: {{SHOESTRING_FAIL_PREFLIGHT: {socket.gethostname()}}}}}\n"
    here = Here(tmp_path, CLUSTER + drill)
    job = here.launch("strategy.devices=2")
    status = here.until(job, "failed")
    (attempt,) = status["attempts"]
    assert attempt["code"] == 86 and "0 of 1 nodes left, 1 needed" in attempt["reason"]
    assert "BAD: fails on purpose: SHOESTRING_FAIL_PREFLIGHT names it" in here.log(job)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
