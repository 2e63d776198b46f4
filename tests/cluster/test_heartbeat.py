"""Tasks of a node (cluster/node/heartbeat.py): what they are told, when, and what is said of those that were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring.cluster.node import attempts, ranks
from shoestring.cluster.node.heartbeat import _alive

# stands where torchrun does: starts tasks, and ends when one fails
LEADER = """
import os, subprocess, sys, time
tasks = [
    subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "RANK": str(rank)}, start_new_session=True)
    for rank in range(2)
]
while any(task.poll() is None for task in tasks) and not any(task.poll() for task in tasks):
    time.sleep(0.05)
sys.exit(any(task.wait() for task in tasks))
"""
TASK = """
import os, signal, sys, time
time.sleep(1.0)  # imports: a signal here would be the end
from shoestring.cluster.node import ranks
from shoestring.exits import die_with_parent
die_with_parent()
signals = []
signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
job_dir, attempt = ranks.place()
record = ranks.begun()
ranks.write(job_dir, attempt, record)
def end(code, error=""):
    ranks.write(job_dir, attempt, ranks.ended(record, code, error))
    sys.exit(code if code != 85 else 0)
{body}
"""
SAVES = "while not signals: time.sleep(0.02)\ntime.sleep(0.3)\nend(85 if len(signals) == 1 else 7)"
MISSES = """
while not signals and not os.path.exists(job_dir / "gone"): time.sleep(0.01)
end(3, "the other one does not answer")
"""


class Node:
    """A node of two tasks, started as a job's script does, and the line that it listens to."""

    def __init__(self, folder: Path, body: str, lead: float = 10) -> None:
        self.folder = folder
        facts = {"hours": 1, "attempt_hours": 1, "lead_seconds": 30, "nodes": 1, "devices_per_node": 2, "requeues": 2}
        (folder / "job.json").write_text(json.dumps(facts))
        attempts.begin(folder, 0, ["here"])
        command = [sys.executable, "-m", "shoestring.cluster.node.heartbeat", "--node-rank", "0", "--tasks", "2",
                   "--lead", str(lead), "--", sys.executable, "-c", LEADER, TASK.format(body=body)]  # fmt: skip
        around = {**os.environ, "SHOESTRING_JOB_DIR": str(folder), "SHOESTRING_ATTEMPT": "0"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=around)

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")
        self.process.stdin.flush()

    def records(self, count: int = 2) -> list[ranks.RankRecord]:
        end = time.monotonic() + 60
        while len(records := ranks.read(self.folder, 0)) < count:
            assert time.monotonic() < end
            time.sleep(0.02)
        return records

    def close(self) -> tuple[str, int]:
        """Wait for its end; the decision about the attempt."""
        code = self.process.wait(60)
        for record in ranks.read(self.folder, 0):
            assert not _alive(record.pid)
        return attempts.end(self.folder, 0, code)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    started: list[Node] = []
    yield started
    for node in started:
        node.process.kill()
        node.process.wait()
        assert node.process.stdin is not None
        node.process.stdin.close()


def test_tasks_are_signalled_once_and_not_before_they_listen(nodes: list[Node], tmp_path: Path) -> None:
    nodes.append(node := Node(tmp_path, SAVES))
    for _ in range(3):
        node.say("USR1")
    node.records()
    for _ in range(3):
        node.say("TERM")
    assert node.close() == ("requeue", 85)


def test_tasks_save_and_end_when_nobody_holds_the_line(nodes: list[Node], tmp_path: Path) -> None:
    nodes.append(node := Node(tmp_path, SAVES))
    node.records()
    assert node.process.stdin is not None
    node.process.stdin.close()
    assert node.close() == ("requeue", 85)


def test_tasks_that_do_not_save_in_time_are_killed(nodes: list[Node], tmp_path: Path) -> None:
    nodes.append(node := Node(tmp_path, "time.sleep(600)", lead=-14))  # of the 15 s that torchrun gets
    node.records()
    node.say("USR1")
    assert node.close() == ("failed", 1)
    assert "left no exit record" in attempts.history(tmp_path)[0].reason


def test_tasks_are_ended_at_once(nodes: list[Node], tmp_path: Path) -> None:
    nodes.append(node := Node(tmp_path, "time.sleep(600)"))
    node.records()
    node.say("KILL")
    assert node.process.wait(30) == 137
    assert node.close() == ("failed", 1)


def test_the_killed_task_is_named_and_not_those_that_missed_it(nodes: list[Node], tmp_path: Path) -> None:
    nodes.append(node := Node(tmp_path, MISSES))
    victim = node.records()[1]
    os.kill(victim.pid, 9)
    (tmp_path / "gone").touch()
    assert node.close() == ("failed", 1)
    assert attempts.history(tmp_path)[0].reason.startswith(f"rank 1 on {victim.host}: killed")


def test_a_lost_node_is_left_out_and_the_job_fails_when_too_few_are_left(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(
        {"hours": 1, "attempt_hours": 1, "lead_seconds": 30, "nodes": 2, "devices_per_node": 1, "requeues": 9}
    ))  # fmt: skip
    pool = ["a", "b", "c"]
    for number, lost, after in ((0, "b", "requeue"), (1, "a", "failed")):
        attempts.begin(tmp_path, number, pool)
        # the others fail for want of it
        record = ranks.RankRecord(rank=0, node_rank=0, host="c", pid=1, started=0.0, ended=1.0, code=1, error="reset")
        ranks.write(tmp_path, number, record)
        assert attempts.end(tmp_path, number, 255, lost=[lost], pool=pool) == (after, 86)
    assert attempts.excluded(tmp_path) == ["b", "a"]
    assert attempts.history(tmp_path)[-1].reason == "lost a; 1 of 3 nodes left, 2 needed"
