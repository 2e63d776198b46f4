"""Nodes that nobody else holds together, as pods and cloud machines are: two of them, each with its own torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoestring.cluster.node import attempts, ranks

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]
FACTS = {"id": "digits-0a1b2c", "nodes": 2, "devices_per_node": 1, "hours": 1, "attempt_hours": 1, "lead_seconds": 30,
         "requeues": 5, "usd_per_device_hour": None}  # fmt: skip
SETTINGS = (
    "techniques=[]", "data.batch_size=64", "strategy.name=ddp", "strategy.nodes=2", "strategy.devices=1",
)  # fmt: skip


class Nodes:
    """Two nodes of one job, each in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.files = folder / "run", folder / "files"
        self.job_dir = self.run_dir / "jobs" / FACTS["id"]
        self.files.mkdir()
        (self.files / "job.json").write_text(json.dumps({**FACTS, "run_dir": str(self.run_dir)}))
        (self.files / "recipe.yaml").write_text("see the command\n")
        self.log = folder / "log"
        self.started: list[subprocess.Popen] = []

    def start(self, steps: int) -> list[subprocess.Popen]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        train = ["-m", "shoestring.trainer.cli", "train", "digits", *SETTINGS, f"budget.steps={steps}"]
        pair = []
        for node in (0, 1):
            place = ["--nodes=2", f"--node={node}", "--master=127.0.0.1", f"--port={port}"]
            last = ["--message", str(self.files / f"message-{node}")]
            words = ["-m", "shoestring.cluster.node.run", str(self.files), *place, *last, "--", *train]
            env = {**os.environ, "SHOESTRING_JOB_DIR": str(self.job_dir), "SHOESTRING_NODE": f"pod-{node}",
                   "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
            words = [sys.executable, *words, "--run-dir", str(self.run_dir)]
            with self.log.open("ab") as log:
                pair.append(subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True))
        self.started += pair
        return pair

    def trains(self, attempt: int) -> None:
        """Wait until both tasks of the attempt have trained for a while."""
        began = time.monotonic()
        while time.monotonic() < began + 120:
            steps = [path for path in self.run_dir.glob("events/*") if b'"step"' in path.read_bytes()]
            here = [path for path in steps if path.stat().st_mtime > self._begun(attempt)]
            if len(ranks.read(self.job_dir, attempt)) == 2 and here:
                return
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-4000:])

    def _begun(self, attempt: int) -> float:
        return max((r.started for r in ranks.read(self.job_dir, attempt)), default=time.time())

    def ended(self, pair: list[subprocess.Popen]) -> list[int]:
        codes = [process.wait(200) for process in pair]
        print(self.log.read_text()[-3000:])
        return codes


@pytest.fixture
def nodes(tmp_path: Path):
    made = Nodes(tmp_path)
    yield made
    for process in made.started:
        for group in (process.pid,):
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def test_saved_then_lost_then_finished(nodes: Nodes) -> None:
    pair = nodes.start(steps=700)
    nodes.trains(0)
    pair[1].send_signal(signal.SIGTERM)  # a pod is evicted
    assert nodes.ended(pair) == [85, 85]
    [first] = attempts.history(nodes.job_dir)
    assert (first.next, first.code, first.nodes) == ("requeue", 85, ("pod-0", "pod-1"))
    assert {record.code for record in ranks.read(nodes.job_dir, 0)} == {85}

    pair = nodes.start(steps=700)
    nodes.trains(1)
    os.killpg(pair[1].pid, signal.SIGKILL)  # a machine is gone
    gone = time.monotonic()
    assert pair[0].wait(60) == 85
    assert time.monotonic() - gone < 40
    assert "lost pod-1" in attempts.history(nodes.job_dir)[1].reason

    pair = nodes.start(steps=700)
    assert nodes.ended(pair) == [0, 0]
    last = attempts.history(nodes.job_dir)
    assert [attempt.next for attempt in last] == ["requeue", "requeue", "finished"]
    summary = json.loads((nodes.run_dir / "summary.json").read_text())
    assert summary["steps"] == 700
    said = (nodes.files / "message-0").read_text().splitlines()
    assert json.loads(said[-1]) == {"excluded": ["pod-1"]} and '"finished"' in said[-2]


def test_a_failure_ends_all_and_is_reported_once(nodes: Nodes) -> None:
    pair = nodes.start(steps=-3)
    codes = nodes.ended(pair)
    assert codes[0] == codes[1] and codes[0] not in (0, 85, 86)
    assert attempts.history(nodes.job_dir)[0].next == "failed"
    assert nodes.log.read_text().count("was the first to fail") == 1
