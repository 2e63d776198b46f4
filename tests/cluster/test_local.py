"""The local engine: real jobs of real tasks, from the command line on."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched_jobs import Job, Launcher, end_all, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

SECRET = 'token-7f3a, "$HOME" 日本'
FILE = """
name: here
engine: local
devices_per_node: {devices}
hardware: cpu
price: {{kind: own}}
{limits}
secrets: {{API_TOKEN: {{env: MY_TOKEN}}}}
"""
# not ddp: from its second step on it adds up more than two ranks' gradients in another order, after a restart too
RECIPE = ("digits", "techniques=[]", "strategy.name=zero2", "checkpoint.every=250 steps")


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    end_all()


def launcher(folder: Path, devices: int, limits: str = "limits: {hours: 1}") -> Launcher:
    return Launcher(folder, FILE.format(devices=devices, limits=limits), MY_TOKEN=SECRET)


def no_secret(job: Job, *places: Path) -> None:
    """Nowhere, in none of its spellings, and the file that it was in is gone."""
    assert not (job.folder / "secrets.sh").exists()
    for place in (job.run_dir, *places):
        for path in place.rglob("*"):
            if path.is_file():
                assert b"token-7f3a" not in path.read_bytes(), path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Launcher, Job]:
    """A run of four tasks that nothing interrupts."""
    here = launcher(tmp_path_factory.mktemp("local"), 4)
    return here, here.launch("whole", *RECIPE, "budget.steps=1000", "tracking.wandb=offline")


def test_four_tasks_come_to_the_end_and_the_secret_is_nowhere(whole: tuple[Launcher, Job]) -> None:
    here, job = whole
    assert stat.S_IMODE((job.folder / "secrets.sh").stat().st_mode) == 0o600
    seen: dict[int, str] = {}

    def looked() -> bool:
        seen.update(job.processes())
        return job.step() >= 1

    wait_for(looked, job.log())
    assert sum("torch.distributed.run" in words for words in seen.values()) >= 1
    assert sum(" train " in words for words in seen.values()) >= 5
    assert not [words for words in seen.values() if "token-7f3a" in words]
    followed = here("logs", "-f", job.id)
    assert "run finished" in followed and followed.rstrip().endswith("the run is finished (0); finished")
    status = job.until("finished")
    assert [a["next"] for a in status["attempts"]] == ["finished"]
    assert (job.run_dir / "final").exists()
    assert len(list((job.run_dir / "wandb").rglob("*.wandb"))) == 1
    no_secret(job, here.folder / "home")
    dry = here("launch", *RECIPE, "--cluster", "cluster.yaml", "--dry-run")
    assert "API_TOKEN: from the environment variable MY_TOKEN" in dry and "token-7f3a" not in dry


def test_cancelled_and_launched_again_it_ends_with_the_same_weights(
    whole: tuple[Launcher, Job],
) -> None:
    here, undisturbed = whole
    undisturbed.until("finished")
    job = here.launch("again", *RECIPE, "budget.steps=1000")
    os.kill(job.pid, signal.SIGUSR1)  # nothing has been imported yet
    wait_for(lambda: job.attempts() == 2, job.log())
    first = job.status()["attempts"][0]
    assert (first["next"], first["code"]) == ("requeue", 85), first
    job.until_step(20)
    here("cancel", job.id)
    status = job.until("cancelled")
    assert status["attempts"][-1]["code"] == 85 and "cancelled" in status["detail"]
    assert not (job.run_dir / "final").exists()
    no_secret(job)

    second = here.launch("again", *RECIPE, "budget.steps=1000")
    assert len(second.until("finished")["attempts"]) == 1
    assert (job.run_dir / "final" / "model.safetensors").read_bytes() == (
        undisturbed.run_dir / "final" / "model.safetensors"
    ).read_bytes()
    assert "resume" in [event["event"] for event in job.events(rank=0)]


def test_an_attempt_whose_time_is_over_saves_and_is_followed_by_another(tmp_path: Path) -> None:
    here = launcher(tmp_path, 1, "limits: {hours: 1, attempt_hours: 80 s}")
    recipe = ("digits", "techniques=[]", "strategy.name=single", "cluster.hardware=cpu")
    here("train", *recipe, "budget.steps=5", "--run-dir", "timed")  # saving is fast here: 30 s are enough for it
    job = here.launch("timed", *recipe, "budget.steps=1000000")
    wait_for(lambda: job.attempts() == 2, job.log())
    first = job.status()["attempts"][0]
    assert (first["next"], first["code"], first["reason"]) == ("requeue", 85, "its time was up")
    assert first["seconds"] >= 30
    here("cancel", job.id)  # while the next one starts
    status = job.until("cancelled")
    assert status["attempts"][1]["code"] == 85


def test_a_killed_task_is_named_and_no_other_outlives_it(tmp_path: Path) -> None:
    here = launcher(tmp_path, 2)
    job = here.launch("killed", "digits", "techniques=[]", "strategy.name=ddp", "budget.steps=100000")
    job.until_step(5)
    victim = json.loads((job.folder / "attempts" / "0" / "rank-00001.json").read_text())
    os.kill(victim["pid"], signal.SIGKILL)
    status = job.until("failed")
    assert f"rank 1 on {victim['host']}: killed" in status["detail"]
    assert f"rank 1 on {victim['host']} was the first to fail" in job.log()
    no_secret(job)


FAILS = """
import os
import pytorch_lightning as pl, torch

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
    def training_step(self, batch, i):
        if i == 3 and self.global_rank == 1:
            raise RuntimeError("refused: " + os.environ["API_TOKEN"])
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def data():
    return [torch.utils.data.TensorDataset(torch.ones(64, 4)) for _ in range(2)]
"""
FAILING = """
name: raises
model: {task: "fails:Model"}
data: {source: "fails:data", batch_size: 4}
budget: {steps: 1000}
strategy: {name: ddp}
"""


def test_a_task_that_raises_is_reported_without_the_secret_in_it(tmp_path: Path) -> None:
    here = launcher(tmp_path, 2)
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "recipe.yaml").write_text(FAILING)
    job = here.launch("raises", "recipe.yaml", "--allow-code")
    status, log = job.until("failed"), job.log()
    assert status["attempts"][0]["code"] == 1
    assert "rank 1 on " in status["detail"] and "RuntimeError: refused: ***" in status["detail"]
    assert "was the first to fail, with exit code 1" in log and "in training_step" in log
    assert any("refused: ***" in str(event.get("reason")) for event in job.events())
    no_secret(job, tmp_path / "home")


def test_tasks_save_and_end_when_their_script_is_killed(tmp_path: Path) -> None:
    here = launcher(tmp_path, 1)
    job = here.launch("orphaned", "digits", "techniques=[]", "budget.steps=1000000", "strategy.name=single")
    job.until_step(5)
    os.kill(job.pid, signal.SIGKILL)
    wait_for(lambda: not job.processes(), f"{job.processes()} are left", 60)
    assert job.status()["state"] == "failed"
    assert [event["event"] for event in job.events(rank=0)][-1] == "preempted"
    no_secret(job)
