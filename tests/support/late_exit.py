"""How late after its save a stopped run leaves: ledger locked, helper of W&B standing still, disk full.

    python tests/support/late_exit.py --times 10

Prints one JSON line a stop, and exits with 1 if one took more than 5 s from the save to the end of the process. Needs
root, for a small file system of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

LIMIT = 5.0
HINDRANCES = ("nothing", "ledger locked", "W&B stopped", "disk full")
TRAIN = [
    "train", "digits", "techniques=[]", "budget={steps: 10000000}", "checkpoint.every=1000000 steps",
    "evaluation.at_end=false", "strategy.name=single",
]  # fmt: skip


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "chaos", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def locked(ledger: Path) -> Iterator[None]:
    ledger.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(ledger, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


def helpers(pid: int) -> list[int]:
    """W&B's processes under `pid`."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name, rest = (folder / "stat").read_text().rpartition(")")[::2]
            if int(rest.split()[1]) == pid and "wandb" in name:
                pids.append(int(folder.name))
    return pids


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = [line for path in run_dir.glob("events/*-r0*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line.rsplit("\t", 1)[0]) if "\t" in line else json.loads(line) for line in lines]


def wait_for(what: Any, seconds: float = 200.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := what()):
        if time.monotonic() > end:
            raise TimeoutError("the training does not get so far")
        time.sleep(0.05)
    return value


def stop(hindrance: str, folder: Path) -> dict[str, Any]:
    """Train, hinder, stop: seconds from the save to the end of the process, and how it ended."""
    with ExitStack() as undo:
        disk = undo.enter_context(small_disk(folder / "disk"))
        run_dir, home = disk / "run", folder / "home"
        env = {**os.environ, "SHOESTRING_HOME": str(home), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
        command = [sys.executable, "-m", "shoestring.trainer.cli", *TRAIN, "tracking={wandb: offline}"]
        with (folder / "said.txt").open("wb") as said:
            process = subprocess.Popen([*command, "--run-dir", str(run_dir)], env=env, stdout=said, stderr=said)
        undo.callback(process.wait)
        undo.callback(process.kill)
        wait_for(lambda: list((run_dir / "checkpoints").glob("0*")) if process.poll() is None else ["gone"])
        stopped = wait_for(lambda: helpers(process.pid))
        wait_for(lambda: list((run_dir / "wandb").rglob("*.wandb")))
        time.sleep(1.0)
        if hindrance == "ledger locked":
            undo.enter_context(locked(home / "ledger.sqlite"))
        if hindrance == "W&B stopped":
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
        if hindrance == "disk full":
            with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
        began = time.time()
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
        ended = time.time()
        saves = [row["t"] for row in rows(run_dir) if row.get("event") in ("checkpoint", "preempted")]
        saved = max([t for t in saves if t >= began], default=began)  # on a full disk nothing says when
        left = [pid for pid in stopped if alive(pid)]
        return {
            "hindrance": hindrance, "code": code, "seconds": round(ended - saved, 2),
            "in all": round(ended - began, 2), "helpers left": len(left),
            "said": (folder / "said.txt").read_text(errors="replace").splitlines()[-3:],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--hindrances", nargs="*", default=HINDRANCES, choices=HINDRANCES)
    given = parser.parse_args()
    results = []
    for hindrance in given.hindrances:
        for _ in range(given.times):
            with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
                results.append(stop(hindrance, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
    for hindrance in given.hindrances:
        took = sorted(r["seconds"] for r in results if r["hindrance"] == hindrance)
        print(json.dumps({"hindrance": hindrance, "slowest": took[-1], "median": took[len(took) // 2]}))
    sys.exit(any(r["seconds"] > LIMIT or r["code"] != 85 or r["helpers left"] for r in results))


if __name__ == "__main__":
    main()
