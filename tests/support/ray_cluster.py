"""A Ray cluster of three nodes on this machine, each with an address of its own on the loopback device."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import free_port


@dataclass
class Nodes:
    """The Ray cluster: its dashboard, and one `ray start --block` a node."""

    folder: Path
    dashboard: str
    address: str
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self, name: str, *words: str) -> None:
        shared = [
            f"--temp-dir={self.folder}", "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats",
            "--block", f"--node-name={name}", f"--node-ip-address=127.0.0.{len(self.processes) + 2}",
            f"--dashboard-agent-listen-port={free_port()}",
        ]  # fmt: skip
        with open(self.folder / f"{name}.log", "wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), "start", *shared, *words],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        until(lambda: name in self.alive(), 120, name, self.folder / f"{name}.log")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.dashboard + path, timeout=10) as answer:
            return json.loads(answer.read())

    def alive(self) -> list[str]:
        try:
            nodes = self.get("/api/v0/nodes?detail=true&limit=100")["data"]["result"]["result"]
        except (OSError, KeyError, TypeError):
            return []  # not up yet
        return [node["node_name"] for node in nodes if node["state"] == "ALIVE"]

    def pull_the_plug(self, name: str) -> None:
        """End a node as a power cut would, seen from the others."""
        listed = subprocess.run(
            ["pgrep", "-P", str(self.processes[name].pid), "raylet"], capture_output=True, text=True
        )
        os.kill(int(listed.stdout), signal.SIGKILL)

    def end(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            process.wait(30)
        for pid in mentioned(str(self.folder), "cmdline"):  # what belonged to a node without plug
            os.kill(pid, signal.SIGKILL)


def mentioned(text: str, where: str) -> list[int]:
    """Processes in whose command line or environment `text` stands."""
    pids = []
    for place in Path("/proc").glob(f"[0-9]*/{where}"):
        try:
            if text.encode() in place.read_bytes() and int(place.parent.name) != os.getpid():
                pids.append(int(place.parent.name))
        except OSError:
            continue
    return pids


def until(true: Callable[[], Any], seconds: float, what: str, log: Path | None = None) -> None:
    """Wait until it is true; where it does not become so in time, `log` is told as it stands then."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}\n{log.read_text() if log else ''}")
        time.sleep(0.5)


@contextmanager
def ray_cluster() -> Iterator[Nodes]:
    """n1 with the dashboard, n2 and n3; two CPUs each."""
    folder = Path(tempfile.mkdtemp(prefix="shr-", dir="/tmp"))  # the paths of sockets must be short
    ports = [free_port() for _ in range(3)]
    made = Nodes(folder, f"http://127.0.0.1:{ports[0]}", f"127.0.0.2:{ports[1]}")
    try:
        made.start(
            "n1", "--head", f"--port={ports[1]}", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[0]}",
            f"--ray-client-server-port={ports[2]}",
        )  # fmt: skip
        for name in ("n2", "n3"):
            made.start(name, f"--address={made.address}")
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)
