"""Signals at random moments of a start: no false exit with 0, no hang, no process left behind.

    python tests/support/startup.py --signals 60 --seed 0

Each start is ended by one signal: to the process that was started, to one rank, or to all ranks; alone or with two
ranks; started by our command or by torchrun; new, or resumed. Prints one JSON line a signal and a summary, and exits
with 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "CHAOS_START"
LIMIT = 30.0  # seconds from the signal to the end
TRAIN = [
    "train", "digits", "techniques=[]", "goal=null", "budget={steps: 10000000}", "tracking={ledger: false}",
    "checkpoint.every=1 s", "evaluation={every: 20 steps}", "--run-dir",
]  # fmt: skip


def processes(mark: str) -> dict[int, str]:
    """pid -> command line of what was started under `mark` and lives."""
    lines = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                lines[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return lines


def ranks(mark: str) -> list[int]:
    """The processes that train, but not their loader workers."""
    lines = {pid: line for pid, line in processes(mark).items() if " train digits" in line}
    lines = {pid: line for pid, line in lines.items() if "torch.distributed.run" not in line}
    return [pid for pid in lines if parent(pid) not in lines or "LOCAL_RANK" in environment(pid)]


def parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def environment(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_text()
    return ""


def command(run_dir: Path, launcher: str, world: int) -> list[str]:
    module = "shoestring.trainer.cli"
    first = [sys.executable, "-m", module]
    if launcher == "torchrun":
        first = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            "-m",
            module,
        ]
    strategy = f"strategy={{name: {'ddp' if world > 1 else 'single'}, devices: {world}}}"
    return [*first, *TRAIN, str(run_dir), strategy]


def hit(mark: str, started: subprocess.Popen[bytes], to: str, number: int, draw: random.Random) -> None:
    alive = ranks(mark)
    targets = {"first": [started.pid], "one": [draw.choice(sorted(alive))] if alive else [], "all": alive}[to]
    for pid in targets or [started.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def one(folder: Path, draw: random.Random, seconds: float = 10.0) -> dict[str, Any]:
    """Start, signal, and look: what was done and what came of it."""
    launcher, world = draw.choice(["command", "torchrun"]), draw.choice([1, 2])
    to, name = draw.choice(["first", "one", "all"]), draw.choice(["SIGTERM", "SIGTERM", "SIGUSR1", "SIGINT"])
    if launcher == "torchrun" and to == "first" and name == "SIGUSR1":
        name = "SIGTERM"  # torchrun passes no other on
    moment = draw.uniform(0, seconds)
    run_dir, mark = folder / f"run-{launcher}-{world}", uuid.uuid4().hex
    resumed = any((run_dir / "checkpoints").glob("0*"))
    env = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (folder / "said.txt").open("w+b") as said:
        started = subprocess.Popen(command(run_dir, launcher, world), env=env, stdout=said, stderr=said, cwd=folder)
        time.sleep(moment)
        early = started.poll() is not None
        lost = launcher == "torchrun" and not ranks(mark)
        hit(mark, started, to, getattr(signal, name), draw)
        if (
            lost
        ):  # torchrun drops a SIGINT in the middle of its own imports, whatever it is to start: a second one counts
            with suppress(subprocess.TimeoutExpired):
                started.wait(LIMIT / 3)
            if started.poll() is None:
                hit(mark, started, to, getattr(signal, name), draw)
        began = time.monotonic()
        try:
            code: int | None = started.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = None
        took = time.monotonic() - began
        end = time.monotonic() + 5
        while (left := processes(mark)) and code is not None and time.monotonic() < end:
            time.sleep(0.1)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.wait()
        said.seek(0)
        words = said.read().decode(errors="replace")
    result = {
        "launcher": launcher, "ranks": world, "to": to, "signal": name, "moment": round(moment, 2),
        "resumed": resumed, "code": code, "seconds": round(took, 2), "left": len(left) if code is not None else 0,
    }  # fmt: skip
    wrong = []
    if code is None:
        wrong.append("hang")
    elif code == 0:
        wrong.append("false exit")
    if early:
        wrong.append("ended by itself")
    if result["left"]:
        wrong.append("orphans")
    # before its first line Python ends by the signal itself
    if launcher == "command" and code not in (None, 0, 85) and (moment > 3 or code != -getattr(signal, name)):
        wrong.append("another code")
    if "Traceback" in words and launcher == "command":
        wrong.append("traceback")
    return {**result, "wrong": wrong, **({"said": words[-3000:]} if wrong else {})}


def many(count: int, seed: int, seconds: float = 10.0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        results = []
        for _ in range(count):
            results.append(one(Path(folder), draw, seconds))
            print(json.dumps(results[-1]), flush=True)
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="the moments are drawn from the first so many")
    given = parser.parse_args()
    # a shell has its background jobs ignore it, and torchrun would until it has handlers of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = many(given.signals, given.seed, given.seconds)
    kinds = ("false exit", "hang", "orphans", "another code", "traceback", "ended by itself")
    print(json.dumps({kind: sum(kind in r["wrong"] for r in results) for kind in kinds}))
    print(json.dumps({"slowest": max((r["seconds"] for r in results), default=0)}))
    sys.exit(any(r["wrong"] for r in results))


if __name__ == "__main__":
    main()
