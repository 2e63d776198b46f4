"""An engine of somebody else's: a package that is merely installed, found by its entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = '''
"""Runs a job by carrier pigeon."""

from shoestring.cluster.engine import EngineStatus
from shoestring.cluster.config.sections import Section


class Options(Section):
    birds: int = 1


class Pigeons:
    name = "pigeons"
    shares_filesystem = True
    Options = Options

    def render(self, job):
        return {"letter.txt": f"{job.tasks} tasks for {job.cluster.options.birds} birds: {' '.join(job.train())}\\n"}

    def remarks(self, job):
        return ["wind from the north"]

    def submit(self, job, files, secrets):
        return "coop-1"

    def query_status(self, record):
        return EngineStatus("queued", detail="in the air")

    def logs(self, record, follow):
        yield "coo"

    def cancel(self, record):
        pass
'''
CLUSTER = "name: coop\nengine: pigeons\ndevices_per_node: 2\nhardware: cpu\nlimits: {hours: 1}\noptions: {birds: 3}\n"


@pytest.fixture
def shoestring(tmp_path: Path):
    """The command line on a machine where such a package is installed."""
    site = tmp_path / "site"
    (site / "pigeons-1.0.dist-info").mkdir(parents=True)
    (site / "pigeons.py").write_text(ENGINE)
    (site / "pigeons-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeons\nVersion: 1.0\n")
    (site / "pigeons-1.0.dist-info" / "entry_points.txt").write_text(
        "[shoestring.engines]\npigeons = pigeons:Pigeons\n"
    )
    (tmp_path / "coop.yaml").write_text(CLUSTER)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    settings = {**os.environ, "PYTHONPATH": path, "SHOESTRING_HOME": str(tmp_path / "home")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shoestring.trainer.cli", *words]
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=60)

    return run


def test_an_installed_engine_is_one_of_ours(shoestring, tmp_path: Path) -> None:
    shown = shoestring("launch", "digits", "--cluster", "coop.yaml", "--dry-run")
    assert "2 tasks for 3 birds: " in shown.stdout and "wind from the north" in shown.stderr, shown
    done = shoestring("launch", "digits", "--cluster", "coop.yaml")
    assert done.returncode == 0 and "(pigeons coop-1)" in done.stdout, done
    listed = shoestring("jobs")
    assert "queued" in listed.stdout and "in the air" in listed.stdout
    job = listed.stdout.splitlines()[1].split()[0]
    assert shoestring("logs", job).stdout == "coo\n"


def test_its_options_and_its_name_are_checked(shoestring, tmp_path: Path) -> None:
    (tmp_path / "coop.yaml").write_text(CLUSTER.replace("birds: 3", "brids: 3"))
    said = shoestring("launch", "digits", "--cluster", "coop.yaml").stderr
    assert "coop.yaml:6: options.brids: found an unknown key" in said and "did you mean birds?" in said
    (tmp_path / "coop.yaml").write_text(CLUSTER.replace("engine: pigeons", "engine: pigeon"))
    said = shoestring("launch", "digits", "--cluster", "coop.yaml").stderr
    assert "coop.yaml:2: engine: found pigeon" in said and "did you mean pigeons?" in said
