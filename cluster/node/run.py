"""One node of a job whose engine starts every node by itself: a pod, a machine of a cloud.

    python -m shoestring.cluster.node.run FILES --nodes 4 --node 2 --master HOST -- -m shoestring.trainer.cli train …

FILES is the folder with the job's `job.json` and `recipe.yaml`; what follows `--` is given to torchrun. Nodes 1, 2, …
connect to node 0 and stay so. Node 0 waits for them, begins the attempt, and at the end hears how each has fared,
decides (attempts.py) and tells them: every node exits with the same code. 0 finished, 85 run me again, 86 a node has
failed its checks, 1 for everything that must not be run again.

A node whose connection breaks is lost: the others are not left waiting in a collective for it, but end, to be run again
from the last checkpoint. TERM and USR1 are passed on once the tasks listen, so that none of them dies of a signal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ... import exits
from . import attempts, ranks
from .rendezvous import Followers, Leader, Lost, take_key

POLL = 0.1  # seconds
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
FAILED_PATIENCE = 10.0  # seconds that a failed node gives the others, to learn who was the first
TERMINATION_BYTES = 4000  # Kubernetes keeps 4096


class Node:
    """This node's tasks under torchrun."""

    def __init__(self, facts: dict[str, Any], job_dir: Path, index: int, attempt: int, seconds: float) -> None:
        self.facts, self.job_dir, self.index, self.attempt = facts, job_dir, index, attempt
        self.lead = float(facts["lead_seconds"])
        self.warning = time.monotonic() + seconds - self.lead
        self.pending: int | None = None  # the signal that came, not yet passed on
        self.warned = False
        self.child: subprocess.Popen[bytes] | None = None

    def start(self, master: str, port: int, command: Sequence[str]) -> None:
        settings = {
            **os.environ,
            "SHOESTRING_ATTEMPT": str(self.attempt),
            # all torchrun's answers are 1 or 0, whatever its workers said: their records are read instead
            "PET_SHUTDOWN_TIMEOUT": str(int(self.lead)),
            "PET_SIGNALS_TO_HANDLE": SIGNALS,
        }
        words = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.facts['nodes']}",
            f"--node-rank={self.index}", f"--nproc-per-node={self.facts['devices_per_node']}",
            f"--master-addr={master}", f"--master-port={port}", "--max-restarts=0", *command,
        ]  # fmt: skip
        self.child = subprocess.Popen(words, env=settings)

    def request_stop(self, number: int, frame: object = None) -> None:
        """Handler: the tasks are to save and end."""
        self.pending = self.pending or number

    def running(self) -> bool:
        """Whether torchrun still runs; on the way, passes on what was asked once every task here can hear it."""
        assert self.child is not None
        if self.child.poll() is not None:
            return False
        if not self.warned and time.monotonic() > self.warning:
            self.warned = True
            self.request_stop(signal.SIGUSR1)
        if self.pending and len(self.records()) == self.facts["devices_per_node"]:
            self.child.send_signal(self.pending)
            self.pending = None
        return True

    def records(self) -> list[ranks.RankRecord]:
        return [r for r in ranks.read(self.job_dir, self.attempt) if r.node_rank == self.index]

    def well(self) -> bool:
        """Whether every task here has ended as it should."""
        codes = [record.code for record in self.records()]
        good = (exits.FINISHED, exits.AGAIN)
        return len(codes) == self.facts["devices_per_node"] and all(code in good for code in codes)

    def kill(self) -> None:
        """End what is left, which waits for somebody who does not come."""
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(5)
        if self.child is not None and self.child.poll() is None:
            for record in self.records():
                with suppress(ProcessLookupError, PermissionError):
                    if record.code is None:
                        os.kill(record.pid, signal.SIGKILL)
            self.child.kill()
            self.child.wait()


def lead(node: Node, others: Followers) -> tuple[str, int, list[str]]:
    """Node 0: watch until all have ended, and decide: (next, code, lost nodes)."""
    deadline = float("inf")
    while node.running() or others.names("running"):
        others.listen()
        if others.names("lost") or others.names("failed") or not (node.running() or node.well()):
            deadline = min(deadline, time.monotonic() + FAILED_PATIENCE)
        elif not node.running():
            deadline = min(deadline, time.monotonic() + node.lead)
        if time.monotonic() > deadline:
            break
        time.sleep(POLL)
    node.kill()
    child, lost = node.child, sorted(set(others.names("lost")))
    after, code = attempts.end(
        node.job_dir, node.attempt, child.returncode if child is not None else exits.FAILURE,
        cancelled=(node.job_dir / "cancelled").exists(), warned=node.warned, lost=lost,
    )  # fmt: skip
    return after, code, lost


def follow(node: Node, leader: Leader) -> int:
    """Another node: watch, tell node 0 how it went, and exit as node 0 says. Node 0 lost: 85, run again."""
    reported = False
    try:
        while True:
            if not reported and not node.running():
                leader.send(well=node.well())
                reported = True
            said = leader.decision()
            if said is not None:
                return said
            time.sleep(POLL)
    except Lost:
        print("[shoestring] node 0 is lost", file=sys.stderr, flush=True)
        return exits.AGAIN
    finally:
        node.kill()


def exit_code(after: str, code: int, lost: Sequence[str]) -> int:
    """Return the exit code for the engine."""
    if after == "finished":
        return exits.FINISHED
    if after == "requeue":
        return exits.AGAIN if lost else code  # a lost node is the engine's to replace
    return exits.FAILURE if code in (exits.FINISHED, exits.AGAIN, exits.BAD_NODE) else code


def prepare(files: Path, job_dir: Path) -> None:
    """The job's folder beside its run, with what the launching machine has said."""
    job_dir.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", "job.json"):
        if not (job_dir / name).exists():
            shutil.copyfile(files / name, job_dir / name)


def leave_message(path: Path, job_dir: Path) -> None:
    """The last attempts and the nodes left out, where the engine keeps a process's last words."""
    rows = (job_dir / attempts.LOG).read_text().splitlines()
    rows.append(json.dumps({"excluded": attempts.excluded(job_dir)}))
    size = 0
    kept: list[str] = []
    for row in reversed(rows):
        size += len(row.encode()) + 1
        if size > TERMINATION_BYTES:
            break
        kept.append(row)
    with suppress(OSError):
        path.write_text("".join(f"{row}\n" for row in reversed(kept)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shoestring.cluster.node.run", description="One node of a job.")
    parser.add_argument("files", type=Path)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--master", required=True, help="where node 0 is")
    parser.add_argument("--port", type=int, default=29500, help="torchrun's; the nodes meet at the one before")
    parser.add_argument("--message", type=Path, help="where to leave the attempts' record at the end")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    facts = json.loads((given.files / "job.json").read_text())
    job_dir = Path(facts["run_dir"], "jobs", facts["id"])
    early: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: early.append(number))
    name = os.environ.get("SHOESTRING_NODE") or os.uname().nodename
    run = _first if given.node == 0 else _other
    return run(given, facts, job_dir, name, early)


def _listen(node: Node, early: list[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, node.request_stop)
    if early:
        node.request_stop(early[0])


def _first(given: argparse.Namespace, facts: dict[str, Any], job_dir: Path, name: str, early: list[int]) -> int:
    prepare(given.files, job_dir)
    number = len(attempts.history(job_dir))
    began = time.monotonic()
    seconds = attempts.begin(job_dir, number, [name])
    with closing(Followers(take_key(facts["id"]), given.nodes - 1, given.port - 1)) as others:
        if not seconds:
            code = exits.FAILURE
        elif others.wait(number, seconds, lambda: bool(early)):
            attempts.note(job_dir, number, nodes=[name, *others.names()])
            node = Node(facts, job_dir, 0, number, seconds - (time.monotonic() - began))
            _listen(node, early)
            node.start(others.address, given.port, given.command)
            code = exit_code(*lead(node, others))
        else:
            ended = attempts.end(job_dir, number, exits.AGAIN if early else exits.FAILURE)
            code = exit_code(*ended, ())
        if given.message:
            leave_message(given.message, job_dir)
        others.decide(code)
    return code


def _other(given: argparse.Namespace, facts: dict[str, Any], job_dir: Path, name: str, early: list[int]) -> int:
    try:
        key = take_key(facts["id"])
        leader = Leader(key, given.master, given.port - 1, given.node, name, lambda: bool(early))
    except Lost as error:
        print(f"[shoestring] {error}", file=sys.stderr, flush=True)
        return exits.AGAIN
    with closing(leader):
        node = Node(facts, job_dir, given.node, leader.attempt, facts["hours"] * 3600)
        _listen(node, early)
        node.start(leader.address, given.port, given.command)
        return follow(node, leader)


if __name__ == "__main__":
    sys.exit(main())
