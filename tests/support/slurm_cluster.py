"""A Slurm cluster on this machine and the commands that one gives on its login node; for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from slow_job import OVER, STATES, write_recipe

SCRIPT = Path(__file__).parents[1] / "cluster" / "slurm_lab.sh"


class SlurmCluster:
    """`folder` is where commands run, and jobs: a recipe and its code, cluster files, runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = subprocess.run([SCRIPT, "env"], check=True, capture_output=True, text=True).stdout
        words = f'eval {lines!r}; printf \'%s\\0%s\' "$PATH" "$SLURM_CONF"'
        path, conf = subprocess.run(["bash", "-c", words], capture_output=True, text=True).stdout.split("\0")
        self.environ = {**os.environ, "PATH": path, "SLURM_CONF": conf}
        write_recipe(folder, "checkpoint: {every: 10 steps}\n")

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 or not check, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def shoestring(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "shoestring.trainer.cli", *words, check=check)

    def cluster_file(self, name: str, *, variables: dict[str, str] | None = None, **keys: Any) -> str:
        """The path of a cluster file; `keys` change or add to the smallest one."""
        values = {
            "name": "lab", "engine": "slurm", "hardware": "cpu", "nodes": 2, "devices_per_node": 2,
            "limits": {"hours": 0.5}, "environment": {"variables": variables or {}}, **keys,
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def launch(self, run: str, *overrides: str, again: bool = False, **cluster: Any) -> dict[str, Any]:
        """Submit the recipe as the run `run`; what `shoestring jobs` says right afterwards."""
        file = str(self.folder / f"{run}.yaml") if again else self.cluster_file(run, **cluster)
        done = self.shoestring(
            "launch", "recipe.yaml", *overrides,
            "--cluster", file, "--run-dir", str(self.home(run)), "--allow-code", "--json",
        )  # fmt: skip
        return self.job(json.loads(done.stdout)["id"])

    def home(self, run: str) -> Path:
        return self.folder / "runs" / run

    def job(self, id: str) -> dict[str, Any]:
        status = json.loads(self.shoestring("jobs", id, "--json").stdout)
        assert status["state"] in STATES, status
        return status

    def wait(self, id: str, until: Callable[[dict[str, Any]], Any], seconds: float = 600) -> dict[str, Any]:
        """Ask after the job until `until` is true of what is said; its log if that takes too long, or it ends first."""
        end = time.monotonic() + seconds
        while True:
            status = self.job(id)
            if until(status):
                return status
            if status["state"] in OVER or time.monotonic() > end:
                raise AssertionError(f"{json.dumps(status, indent=1)}\n{self.log(id)}")
            time.sleep(1)

    def ended(self, id: str, **how: Any) -> dict[str, Any]:
        return self.wait(id, lambda job: job["state"] in OVER, **how)

    def training(self, id: str, step: int = 1) -> dict[str, Any]:
        """Wait until the job's run has saved `step` or a later one."""
        return self.wait(id, lambda job: self.saved_step(Path(job["run_dir"])) >= step)

    def saved_step(self, home: Path) -> int:
        latest = home / "checkpoints" / "latest"
        return int(latest.read_text()) if latest.exists() else 0

    def log(self, id: str, *how: str) -> str:
        return self.shoestring("logs", id, *how).stdout

    def weights(self, run: str) -> bytes:
        return (self.home(run) / "final" / "model.safetensors").read_bytes()

    def fact(self, job: dict[str, Any], key: str) -> str:
        """What Slurm itself says of a job: `JobState`, `Restarts`, …"""
        words = self.run("scontrol", "show", "job", "-o", job["engine_id"]).stdout.split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))

    @contextmanager
    def unplugged(self, node: str) -> Iterator[None]:
        """A node without its network cable; switched off and on again afterwards."""
        self.run(str(SCRIPT), "cut", node)
        try:
            yield
        finally:
            self.run(str(SCRIPT), "restore", node)
