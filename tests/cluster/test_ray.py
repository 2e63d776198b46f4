"""Jobs on a real Ray cluster of three nodes on this machine."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_line import command
from processes import free_port
from ray_cluster import Nodes, mentioned, ray_cluster, until
from slow_job import STATES, write_recipe

from shoestring.cluster.node import attempts

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

PAUSE = {"PAUSE": "2"}  # seconds that a step of the first attempt takes, 120 in all
VARIABLES = {
    "COMMAS": "a,b,,c", "QUOTES": "it's \"so\"", "SPACES": "  two  spaces ", "LINES": "one\ntwo\n",
    "DOLLAR": "$HOME `id` \\$x %d", "UNICODE": "Größe 量 🙂", "EQUALS": "a=b=c",
}  # fmt: skip
SECRET = "s3cret-5d1f0c7a9be2"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_cluster() as made:
        yield made


@dataclass
class Jobs:
    """The command line, called in one folder; what it says is kept to be looked at."""

    folder: Path
    dashboard: str
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    states: list[str] = field(default_factory=list)

    def say(self, *words: str) -> str:
        code = command(self.monkeypatch, *words)
        captured = self.capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    def launch(
        self, name: str, *words: str, limits: str = "hours: 1 h", nodes: int = 2, variables: dict[str, str] = PAUSE
    ) -> tuple[str, Path]:
        """(Id, job's folder) of a job of two tasks a node; its run's folder is `name`."""
        given = json.dumps(variables, ensure_ascii=False)
        (self.folder / "cluster.yaml").write_text(
            f"name: lab\nengine: ray\nnodes: {nodes}\ndevices_per_node: 2\nhardware: cpu\nprice: {{kind: own}}\n"
            f"limits: {{{limits}}}\nsecrets: {{TOKEN: {{env: RAY_TEST_TOKEN}}}}\n"
            f"environment: {{variables: {given}}}\noptions: {{address: '{self.dashboard}'}}\n"
        )
        run = ("--cluster", "cluster.yaml", "--run-dir", str(self.folder / name))
        answer = json.loads(self.say("launch", "recipe.yaml", *words, *run, "--allow-code", "--json"))
        self.remarks = answer["remarks"]
        return answer["id"], self.folder / name / "jobs" / answer["id"]

    def job(self, id: str) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.say("jobs", id, "--json"))
        self.states.append(status["state"])
        assert status["state"] in STATES
        return status

    def wait(self, id: str, true: Callable[[dict[str, Any]], Any], seconds: float = 400) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while not true(status := self.job(id)):
            assert time.monotonic() < end and status["state"] not in ("failed", "exhausted"), (
                f"{status}\n{self.say('logs', id)[-5000:]}"
            )
            time.sleep(1)
        return status


@pytest.fixture
def jobs(nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Jobs:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("RAY_TEST_TOKEN", SECRET)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # the cluster file's goes first
    return Jobs(workplace, nodes.dashboard, monkeypatch, capsys)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray jobs")
    write_recipe(folder)
    return folder


def trains(job_dir: Path) -> bool:
    """Whether the job has said that it trains."""
    log = job_dir / "output.log"
    return log.exists() and "/60  loss" in log.read_text(errors="replace")


def saved(run_dir: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(place.name) for place in (run_dir / "checkpoints").glob("[0-9]*"))


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "final" / "model.safetensors").read_bytes()).hexdigest()


def holding(text: str, folder: Path) -> list[Path]:
    """The files below `folder` in which `text` stands."""
    files = [place for place in folder.rglob("*") if place.is_file() and not place.is_symlink()]
    return [place for place in files if text.encode() in place.read_bytes()]


def environment(job_dir: Path, rank: int) -> dict[str, str]:
    """What a task found around it; forgotten then, for it holds the secret."""
    path = job_dir / f"environment-{rank}.json"
    variables: dict[str, str] = json.loads(path.read_text())
    path.unlink()
    return variables


def test_a_job_runs_to_its_end(nodes: Nodes, jobs: Jobs, workplace: Path) -> None:
    id, job_dir = jobs.launch("whole", variables=VARIABLES)
    assert [remark.partition(" = ")[2] for remark in jobs.remarks] == ["$0.00 at most"], "and nothing to warn of"
    assert (job_dir / "secrets.sh").stat().st_mode & 0o777 == 0o600
    jobs.wait(id, lambda job: job["state"] == "running")
    said = jobs.say("logs", "-f", id)
    job = jobs.job(id)
    assert jobs.states[-2:] == ["running", "finished"]
    assert [(a["code"], a["next"]) for a in job["attempts"]] == [(0, "finished")]
    assert "60, stopped by steps" in said and "attempt 0: the run is finished (0); finished" in said
    assert id in [row["id"] for row in json.loads(jobs.say("jobs", "--json"))]

    around = [environment(job_dir, rank) for rank in range(4)]
    for rank, environ in enumerate(around):
        assert {name: environ[name] for name in VARIABLES} == VARIABLES
        assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == (str(rank), str(rank % 2), "4")
        assert environ["TOKEN"] == SECRET and environ["SHOESTRING_NODE"] == job["on"][rank // 2]
    assert len(set(job["on"])) == 2
    assert {environ["MASTER_ADDR"] for environ in around} == {f"127.0.0.{int(job['on'][0][1]) + 1}"}

    assert not (job_dir / "secrets.sh").exists()
    assert nodes.get(f"/api/jobs/{id}")["status"] == "SUCCEEDED"
    about = json.dumps([nodes.get("/api/jobs/"), nodes.get(f"/api/jobs/{id}/logs")])
    assert "RAY_JOB_STOP_WAIT_TIME_S" in about and "the run is finished" in about and SECRET not in about
    assert holding(id, nodes.folder) and not holding(SECRET, nodes.folder), "what Ray writes down"
    assert holding(id, workplace) and not holding(SECRET, workplace), "what the job leaves behind"


def test_a_time_limit_costs_no_bit(jobs: Jobs, workplace: Path) -> None:
    [whole] = attempts.history(next((workplace / "whole" / "jobs").iterdir()))
    # 30 s before it everybody is told to save: time enough for a whole run, if its steps were not too long for that
    limit = max(62, int(2 * whole.seconds) + 30)
    pause = {"PAUSE": f"{max(2, (limit - 30) / 50):.1f}"}
    id, _ = jobs.launch("cut", limits=f"hours: 1 h, attempt_hours: {limit} s", variables=pause)
    job = jobs.wait(id, lambda job: job["state"] == "finished", 1000)
    first, *_, last = [(a["code"], a["next"], a["reason"]) for a in job["attempts"]]
    assert first == (85, "requeue", "its time was up") and last == (0, "finished", "the run is finished")
    assert job["attempts"][0]["seconds"] < limit
    assert digest(workplace / "cut") == digest(workplace / "whole")


def test_a_cancelled_job_has_saved_and_leaves_nothing_running(nodes: Nodes, jobs: Jobs, workplace: Path) -> None:
    id, job_dir = jobs.launch("cancelled")
    jobs.wait(id, lambda job: trains(job_dir))
    assert len(mentioned(f"SHOESTRING_JOB={id}", "environ")) > 4, "the ranks among them"
    assert "signal to save and end" in jobs.say("cancel", id)
    job = jobs.wait(id, lambda job: job["state"] == "cancelled", 120)
    assert job["attempts"][-1]["code"] == 85 and job["detail"] == "the job was cancelled"
    assert 1 < saved(workplace / "cancelled") < 60
    until(lambda: nodes.get(f"/api/jobs/{id}")["status"] == "STOPPED", 20, "Ray knows that the job was stopped")
    until(lambda: not mentioned(f"SHOESTRING_JOB={id}", "environ"), 20, "no process of the job is left")
    assert command(jobs.monkeypatch, "cancel", id) == 2, "it is not running any more"
    assert not (job_dir / "secrets.sh").exists()


def test_a_job_that_finds_no_nodes_waits_and_can_be_cancelled(jobs: Jobs) -> None:
    id, job_dir = jobs.launch("large", "data.batch_size=20", nodes=5)
    assert jobs.remarks[-1] == "3 of Ray's 3 nodes have 2 CPU; the job wants 5; it waits for more"
    job = jobs.wait(id, lambda job: job["detail"].startswith("RUNNING"))
    assert (job["state"], job["detail"]) == ("queued", "RUNNING: waits for 5 nodes with 2 CPU")
    jobs.say("cancel", id)
    job = jobs.wait(id, lambda job: job["state"] == "cancelled", 60)
    assert job["detail"] == "the job was cancelled before any task started" and job["seconds"] < 1
    assert not (job_dir / "secrets.sh").exists()


def test_excluded_nodes_are_not_used(nodes: Nodes, tmp_path: Path) -> None:
    check = f"""if True:
        import ray, sys
        from pathlib import Path
        from shoestring.cluster.engines import ray_driver
        ray.init("{nodes.address}", log_to_driver=False)
        options = {{"labels": {{}}, "resources": {{}}, "cpus_per_task": 1}}
        facts = {{"nodes": 1, "devices_per_node": 2, "hardware": "cpu", "options": options}}
        group = ray_driver.wait_for_group(facts, Path(sys.argv[1]), ray_driver.JobSignals())
        print([ray_driver.names()[id] for id in ray_driver.ids_of(group)])
    """
    alive = nodes.alive()
    assert len(alive) == 3
    for wanted in alive:
        (tmp_path / "excluded").write_text("\n".join(name for name in alive if name != wanted))
        done = subprocess.run([sys.executable, "-c", check, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert done.stdout == f"['{wanted}']\n", done.stderr


def test_a_cluster_that_does_not_answer(jobs: Jobs) -> None:
    jobs.dashboard = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(AssertionError, match=r"Ray's dashboard at http://127\.0\.0\.1:\d+ does not answer"):
        jobs.launch("nowhere")
    assert not (jobs.folder / "nowhere").exists(), "nothing is left behind"


def test_a_lost_node_is_replaced(nodes: Nodes, jobs: Jobs, workplace: Path) -> None:
    id, job_dir = jobs.launch("lost")
    jobs.wait(id, lambda job: trains(job_dir))
    gone = next(name for name in jobs.job(id)["on"] if name != "n1")
    nodes.pull_the_plug(gone)
    job = jobs.wait(id, lambda job: job["state"] == "finished", 600)
    first, last = [(a["code"], a["next"], a["reason"]) for a in job["attempts"]]
    assert first == (86, "requeue", f"lost {gone}") and last == (0, "finished", "the run is finished")
    assert gone not in job["on"] and attempts.excluded(job_dir) == [gone]
    assert digest(workplace / "lost") == digest(workplace / "whole")
