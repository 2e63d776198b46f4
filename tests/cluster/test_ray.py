"""Jobs on a real Ray cluster of three nodes on this machine, each with an address of its own on the loopback device."""

from __future__ import annotations

import hashlib
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_line import command
from processes import free_port

from shoestring.cluster import attempts

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

STATES = {"submitted", "queued", "running", "requeued", "finished", "cancelled", "exhausted", "failed"}
STEPS = 300
# a step is as long on every machine, so that a signal comes in the middle of the run
SLOW = """
import time
import pytorch_lightning as pl
from shoestring.callbacks.contract import Card, Technique

class Slow(Technique, pl.Callback):
    card = Card(name="slow", does="waits in every step")

    def __init__(self, *, seconds: float = 0.12) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        time.sleep(self.seconds)
"""
RECIPE = (f"budget.steps={STEPS}", "strategy.name=zero2", "techniques=[slow:Slow]", "--allow-code")
VARIABLES = {
    "COMMAS": "a,b,,c", "QUOTES": "it's \"so\"", "SPACES": "  two  spaces ", "LINES": "one\ntwo\n",
    "DOLLAR": "$HOME `id` \\$x %d", "UNICODE": "Größe 量 🙂", "EQUALS": "a=b=c",
}  # fmt: skip
SECRET = "s3cret-5d1f0c7a9be2"


@dataclass
class Nodes:
    """The Ray cluster: its dashboard, and one `ray start --block` a node."""

    folder: Path
    dashboard: str = ""
    address: str = ""
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
        until(lambda: name in self.alive(), 60, f"{name}\n{(self.folder / f'{name}.log').read_text()}")

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.dashboard + path, timeout=10) as answer:
            return json.loads(answer.read())

    def alive(self) -> list[str]:
        try:
            told = self.ask("/api/v0/nodes?detail=true&limit=100")["data"]["result"]["result"]
        except (OSError, KeyError, TypeError):
            return []  # not up yet
        return [node["node_name"] for node in told if node["state"] == "ALIVE"]

    def pull_the_plug(self, name: str) -> None:
        """End a node as a power cut would, seen from the others."""
        found = subprocess.run(["pgrep", "-P", str(self.processes[name].pid), "raylet"], capture_output=True, text=True)
        os.kill(int(found.stdout), signal.SIGKILL)

    def end(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            process.wait(30)
        for pid in mentioned(str(self.folder), "cmdline"):  # what belonged to a node without plug
            os.kill(pid, signal.SIGKILL)


def mentioned(text: str, where: str) -> list[int]:
    """Processes in whose command line or environment `text` stands."""
    found = []
    for place in Path("/proc").glob(f"[0-9]*/{where}"):
        try:
            if text.encode() in place.read_bytes() and int(place.parent.name) != os.getpid():
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def until(true: Callable[[], Any], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="shr-", dir="/tmp"))  # the paths of sockets must be short
    made = Nodes(folder)
    ports = [free_port() for _ in range(3)]
    made.dashboard, made.address = f"http://127.0.0.1:{ports[0]}", f"127.0.0.2:{ports[1]}"
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
        told = self.capsys.readouterr()
        assert code == 0, told.err
        return told.out

    def launch(self, name: str, *words: str, limits: str = "hours: 1 h", nodes: int = 2) -> tuple[str, Path]:
        """(Id, job's folder) of a job of two tasks a node; its run's folder is `name`."""
        variables = json.dumps(
            {**VARIABLES, "PYTHONPATH": f"{self.folder}:{os.environ.get('PYTHONPATH', '')}"}, ensure_ascii=False
        )
        (self.folder / "cluster.yaml").write_text(
            f"name: lab\nengine: ray\nnodes: {nodes}\ndevices_per_node: 2\nhardware: cpu\nprice: {{kind: own}}\n"
            f"limits: {{{limits}}}\nsecrets: {{TOKEN: {{env: RAY_TEST_TOKEN}}}}\n"
            f"environment: {{variables: {variables}}}\noptions: {{address: '{self.dashboard}'}}\n"
        )
        run = str(self.folder / name)
        told = json.loads(self.say("launch", "digits", *words, "--cluster", "cluster.yaml", "--run-dir", run, "--json"))
        self.remarks = told["remarks"]
        return told["id"], self.folder / name / "jobs" / told["id"]

    def job(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.say("jobs", id, "--json"))
        self.states.append(found["state"])
        assert set(self.states) <= STATES
        return found

    def wait(self, id: str, true: Callable[[dict[str, Any]], Any], seconds: float = 400) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while not true(found := self.job(id)):
            assert time.monotonic() < end and found["state"] not in ("failed", "exhausted"), (
                f"{found}\n{self.say('logs', id)[-5000:]}"
            )
            time.sleep(1)
        return found


@pytest.fixture
def jobs(nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Jobs:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("RAY_TEST_TOKEN", SECRET)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # the cluster file's goes first
    return Jobs(workplace, nodes.dashboard, monkeypatch, capsys)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray jobs")
    (folder / "slow.py").write_text(SLOW)
    return folder


def steps(job_dir: Path) -> bool:
    """Whether the attempt that runs has said that it trains."""
    log = job_dir / "output.log"
    said = log.read_text(errors="replace").rpartition("[shoestring] attempt")[2] if log.exists() else ""
    return f"/{STEPS}  loss" in said


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "final.safetensors").read_bytes()).hexdigest()


def holding(text: str, folder: Path) -> list[Path]:
    """The files below `folder` in which `text` stands."""
    files = [place for place in folder.rglob("*") if place.is_file() and not place.is_symlink()]
    return [place for place in files if text.encode() in place.read_bytes()]


def test_a_job_runs_to_its_end(nodes: Nodes, jobs: Jobs, workplace: Path) -> None:
    id, job_dir = jobs.launch("whole", *RECIPE)
    assert [remark.partition(" = ")[2] for remark in jobs.remarks] == ["$0.00 at most"], "and nothing to warn of"
    assert (job_dir / "secrets.sh").stat().st_mode & 0o777 == 0o600
    jobs.wait(id, lambda told: steps(job_dir))
    record = json.loads((job_dir / "attempts" / "0" / "rank-00003.json").read_text())
    found = Path(f"/proc/{record['pid']}/environ").read_bytes().decode().split("\0")
    environ = dict(line.partition("=")[::2] for line in found)
    assert {name: environ[name] for name in VARIABLES} == VARIABLES
    assert (environ["TOKEN"], environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"]) == (SECRET, "4", "2")
    said = jobs.say("logs", "-f", id)
    told = jobs.job(id)
    assert jobs.states[-2:] == ["running", "finished"]
    assert len(told["on"]) == 2 and environ["SHOESTRING_NODE"] == told["on"][1]
    assert [(a["code"], a["next"]) for a in told["attempts"]] == [(0, "finished")]
    assert f"{STEPS}, stopped by steps" in said and "attempt 0: the run is finished (0); finished" in said
    assert id in [row["id"] for row in json.loads(jobs.say("jobs", "--json"))]

    assert not (job_dir / "secrets.sh").exists()
    about = json.dumps(nodes.ask("/api/jobs/"))
    assert id in about and "RAY_JOB_STOP_WAIT_TIME_S" in about
    until(lambda: nodes.ask(f"/api/jobs/{id}")["status"] == "SUCCEEDED", 20, "Ray knows that the job has ended")
    assert "the run is finished" in nodes.ask(f"/api/jobs/{id}/logs")["logs"]
    assert SECRET not in about + nodes.ask(f"/api/jobs/{id}/logs")["logs"]
    assert holding(id, nodes.folder) and not holding(SECRET, nodes.folder), "what Ray writes down"
    assert holding(id, workplace) and not holding(SECRET, workplace), "what the job leaves behind"


def test_a_lost_node_and_a_time_limit_cost_no_bit(nodes: Nodes, jobs: Jobs, workplace: Path) -> None:
    [first] = [json.loads(line) for line in jobs_of(workplace / "whole")]
    whole = sum(attempt.seconds for attempt in attempts.history(first["job_dir"]))
    # 30 s before the limit everybody is told to save: in the middle of the steps
    limit = max(62, int(whole) + 15)
    id, job_dir = jobs.launch("cut", *RECIPE, limits=f"hours: 1 h, attempt_hours: {limit} s")
    jobs.wait(id, lambda told: steps(job_dir))
    gone = next(name for name in jobs.job(id)["on"] if name != "n1")
    nodes.pull_the_plug(gone)
    told = jobs.wait(id, lambda told: told["state"] == "finished", 600)
    assert "requeued" in jobs.states
    said = [(a["code"], a["next"], a["reason"]) for a in told["attempts"]]
    assert said[:2] == [(86, "requeue", f"lost {gone}"), (85, "requeue", "its time was over")]
    assert said[-1] == (0, "finished", "the run is finished") and len(said) <= 4
    assert gone in told["attempts"][0]["nodes"] and all(gone not in a["nodes"] for a in told["attempts"][1:])
    assert attempts.excluded(job_dir) == [gone]
    assert digest(workplace / "cut") == digest(workplace / "whole")


def jobs_of(run_dir: Path) -> list[str]:
    return [json.dumps(json.loads(path.read_text())["record"]) for path in run_dir.glob("jobs/*/job.json")]


def test_a_cancelled_job_has_saved_and_leaves_nothing_running(nodes: Nodes, jobs: Jobs, workplace: Path) -> None:
    id, job_dir = jobs.launch("cancelled", *RECIPE)
    jobs.wait(id, lambda told: steps(job_dir))
    running = mentioned(f"SHOESTRING_JOB={id}", "environ")
    assert len(running) > 4, "the ranks among them"
    assert "told to save and end" in jobs.say("cancel", id)
    told = jobs.wait(id, lambda told: told["state"] == "cancelled", 90)
    assert told["attempts"][-1]["code"] == 85 and told["detail"] == "the job was cancelled"
    manifests = sorted((workplace / "cancelled" / "checkpoints").glob("[0-9]*"))
    assert 1 < int(manifests[-1].name) < STEPS, "saved when it was asked to"
    until(lambda: not mentioned(f"SHOESTRING_JOB={id}", "environ"), 20, "no process of the job is left")
    until(lambda: nodes.ask(f"/api/jobs/{id}")["status"] == "STOPPED", 20, "Ray knows that the job was stopped")
    assert command(jobs.monkeypatch, "cancel", id) == 2, "it is not running any more"
    assert not (job_dir / "secrets.sh").exists()


def test_a_job_that_finds_no_nodes_waits_and_can_be_cancelled(nodes: Nodes, jobs: Jobs) -> None:
    there = len(nodes.alive())
    id, job_dir = jobs.launch("large", "data.batch_size=80", nodes=5)
    assert jobs.remarks[-1] == f"{there} of Ray's {there} nodes have 2 CPU; the job wants 5; it waits for more"
    told = jobs.wait(id, lambda told: told["detail"].startswith("RUNNING"))
    assert (told["state"], told["detail"]) == ("queued", "RUNNING: waits for 5 nodes with 2 CPU")
    jobs.say("cancel", id)
    told = jobs.wait(id, lambda told: told["state"] == "cancelled", 60)
    assert told["detail"] == "the job was cancelled before anything began" and told["seconds"] < 1
    assert not (job_dir / "secrets.sh").exists()


def test_excluded_nodes_are_not_used(nodes: Nodes, tmp_path: Path) -> None:
    check = f"""if True:
        import ray, sys
        from pathlib import Path
        from shoestring.cluster.engines import ray_driver
        ray.init("{nodes.address}", log_to_driver=False)
        options = {{"labels": {{}}, "resources": {{}}, "cpus_per_task": 1}}
        facts = {{"nodes": 1, "devices_per_node": 2, "hardware": "cpu", "options": options}}
        group = ray_driver.wait_for_group(facts, Path(sys.argv[1]), ray_driver.Asked())
        print([ray_driver.names()[id] for id in ray_driver.ids_of(group)])
    """
    alive = nodes.alive()
    for wanted in alive:
        (tmp_path / "excluded").write_text("\n".join(name for name in alive if name != wanted))
        done = subprocess.run([sys.executable, "-c", check, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert done.stdout == f"['{wanted}']\n", done.stderr


def test_a_cluster_that_does_not_answer(jobs: Jobs, tmp_path: Path) -> None:
    jobs.dashboard = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(AssertionError, match=r"Ray's dashboard at http://127\.0\.0\.1:\d+ does not answer"):
        jobs.launch("nowhere", *RECIPE)
    assert not (jobs.folder / "nowhere").exists(), "nothing is left behind"
