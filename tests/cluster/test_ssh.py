"""The ssh engine with three machines of network namespaces, each with a real sshd: see ssh_lab.sh."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from launched_jobs import Job, Launcher, end_all, wait_for

from shoestring.cluster.node import ranks

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

LAB = Path(__file__).with_name("ssh_lab.sh")
SECRET = "token-9b1e\n'$(id)'\\ , 秘密"
RECIPE = ("digits", "techniques=[]", "strategy.name=zero2", "checkpoint.every=50 steps")
ODD = [
    "",
    " ",
    "a,b",
    'say "no"',
    "it's",
    "two\nlines\n",
    "$HOME `id` $(id)",
    "\\",
    "tab\t",
    "grün 日本 🧪",
    "*",
    "-n",
    "!!",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The machines n1, n2 and n3."""
    folder = tmp_path_factory.mktemp("lab")
    subprocess.run([LAB, folder, "up", "3"], check=True)
    yield folder
    end_all()
    subprocess.run([LAB, folder, "down"], check=True)


def launcher(lab: Path, folder: Path, **environment: object) -> Launcher:
    variables = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    environment["variables"] = {**variables, **environment.get("variables", {})}  # type: ignore[dict-item]
    cluster = {
        "name": "machines", "engine": "ssh", "nodes": 2, "devices_per_node": 2, "hardware": "cpu",
        "price": {"kind": "own"}, "limits": {"hours": 1}, "secrets": {"API_TOKEN": {"env": "MY_TOKEN"}},
        "environment": environment, "options": {
            "hosts": ["n1", "n2", "n3"], "config": str(lab / "ssh_config"), "identity": str(lab / "key"),
            "ssh_options": ["ServerAliveInterval=2", "ConnectTimeout=3"],
        },
    }  # fmt: skip
    text = yaml.safe_dump(cluster)
    return Launcher(folder, text, [str(LAB), str(lab), "run"], MY_TOKEN=SECRET)


@pytest.fixture(scope="module")
def whole(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Launcher, Job, dict[str, str]]:
    """A run that nothing interrupts, of tasks with odd variables around them."""
    values = list(ODD)

    @settings(max_examples=150)
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
    def collect(text: str) -> None:
        values.append(text)

    collect()
    variables = {f"ODD_{number}": value for number, value in enumerate(values)}
    here = launcher(lab, tmp_path_factory.mktemp("ssh"), variables=variables)
    return here, here.launch("whole", *RECIPE, "budget.steps=800"), variables


def test_two_nodes_of_two_tasks_come_to_the_end_with_every_value_as_it_was_written(
    whole: tuple[Launcher, Job, dict[str, str]],
) -> None:
    here, job, variables = whole
    wait_for(lambda: len(ranks.read(job.folder, 0)) == 4, "not all tasks have started")
    records = ranks.read(job.folder, 0)
    assert [(r.node_rank, r.host) for r in records] == [(0, "n1"), (0, "n1"), (1, "n2"), (1, "n2")]
    for record in records:
        around = Path(f"/proc/{record.pid}/environ").read_bytes().decode().split("\0")
        seen = dict(line.partition("=")[::2] for line in around)
        assert {name: seen.get(name) for name in variables} == variables
        assert seen["API_TOKEN"] == SECRET
    assert not [words for words in job.processes().values() if "token-9b1e" in words or "ODD_" in words]
    status = job.until("finished")
    assert [a["nodes"] for a in status["attempts"]] == [["n1", "n2"]]
    assert not (job.folder / "secrets.sh").exists()
    for path in [*job.run_dir.rglob("*"), *(here.folder / "home").rglob("*")]:
        assert not path.is_file() or b"token-9b1e" not in path.read_bytes(), path


def test_a_node_that_is_cut_off_is_replaced_and_nothing_is_lost(
    lab: Path, whole: tuple[Launcher, Job, dict[str, str]]
) -> None:
    here, undisturbed, _ = whole
    undisturbed.until("finished")
    job = here.launch("cut", *RECIPE, "budget.steps=800")
    job.until_step(60)
    subprocess.run([LAB, lab, "cut", "n2"], check=True)
    try:
        # those behind the cut hear nothing any more, and end too
        status = job.until("finished")
    finally:
        subprocess.run([LAB, lab, "restore", "n2"], check=True)
    assert [a["nodes"] for a in status["attempts"]] == [["n1", "n2"], ["n1", "n3"]]
    assert (status["attempts"][0]["next"], status["attempts"][0]["reason"]) == ("requeue", "lost n2")
    assert (job.folder / "excluded").read_text() == "n2\n"
    resumed = [event["step"] for event in job.events(rank=0) if event["event"] == "resume"]
    assert resumed and resumed[0] >= 50
    assert (job.run_dir / "final" / "model.safetensors").read_bytes() == (
        undisturbed.run_dir / "final" / "model.safetensors"
    ).read_bytes()


def test_tasks_save_and_end_without_their_script_and_when_they_are_cancelled(
    whole: tuple[Launcher, Job, dict[str, str]],
) -> None:
    here, _, _ = whole
    job = here.launch("ended", *RECIPE, "budget.steps=1000000")
    job.until_step(5)
    # the script is gone, and so are the connections: nobody reads what the tasks say either
    for pid in [job.pid, *(pid for pid, words in job.processes().items() if words.startswith("ssh "))]:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not job.processes(), f"{job.processes()} are left", 60)
    assert job.status()["state"] == "failed" and not (job.folder / "secrets.sh").exists()
    assert job.events(rank=0)[-1]["event"] == "preempted"
    saved = job.events(rank=0)[-1]["step"]

    again = here.launch("ended", *RECIPE, "budget.steps=1000000")
    again.until_step(saved + 5)
    assert again.events(rank=0)[-1]["event"] != "preempted"
    here("cancel", again.id)
    status = again.until("cancelled")
    assert [(a["next"], a["code"]) for a in status["attempts"]] == [("cancelled", 85)]
    assert again.events(rank=0)[-1]["event"] == "preempted"


def test_what_is_missing_is_said_for_each_host(lab: Path, tmp_path: Path) -> None:
    here = launcher(lab, tmp_path, python="/no/python")
    job = here.launch("none", *RECIPE)
    remarks = job.launched["remarks"]
    assert [f"n{i}: there is no /no/python" for i in (1, 2, 3)] == [r for r in remarks if "python" in r]
    assert "0 of 4 tasks started" in job.until("failed")["detail"]
    assert "n1: [shoestring] n1: there is no /no/python" in job.log()


def test_without_enough_hosts_the_job_fails_and_says_so(lab: Path, tmp_path: Path) -> None:
    here = launcher(lab, tmp_path)
    for host in ("n2", "n3"):
        subprocess.run([LAB, lab, "cut", host], check=True)
    try:
        job = here.launch("few", *RECIPE)
        assert [r.split(":")[0] for r in job.launched["remarks"] if "n1" not in r and "=" not in r] == ["n2", "n3"]
        status = job.until("failed")
    finally:
        for host in ("n2", "n3"):
            subprocess.run([LAB, lab, "restore", host], check=True)
    assert status["detail"] == "lost n3; 1 of 3 nodes left, 2 needed"
    assert not (job.folder / "secrets.sh").exists()
