"""What is known of jobs afterwards: from the ledger, from the run's folder, and what the commands say of it."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from jobs import a_cluster, a_job

from shoestring.cluster import ClusterError, launch
from shoestring.cluster.engine import JobRecord
from shoestring.cluster.launch import find, records
from shoestring.cluster.node import attempts
from shoestring.recipes import load_recipe
from shoestring.trainer.cli.app import main
from shoestring.trainer.jobs.submit import known_jobs
from shoestring.trainer.ledger import Ledger, RunIdentity

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test with a ledger and a folder of its own."""
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submitted(folder: Path, id: str, *, number: int = 1, run: str = "digits", **row) -> Path:
    """A job that has been submitted on this machine and has one attempt behind it; its run, indexed."""
    run_dir = folder / "elsewhere" / run
    job = a_job(folder, id=id, run_dir=str(run_dir), cluster=a_cluster(folder, "local", secrets={}))
    job_dir = Path(job.job_dir)
    job_dir.mkdir(parents=True)
    record = {"id": id, "engine": "local", "engine_id": f"here:{number}:9", "run_dir": str(run_dir),
              "job_dir": str(job_dir), "submitted": 1000.0 + number}  # fmt: skip
    (job_dir / "job.json").write_text(json.dumps({**job.facts(), "record": record}))
    attempt = {"attempt": 0, "started": 100.0, "ended": 3700.0, "code": 0, "next": "finished", "reason": "done", **row}
    (job_dir / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
    recipe = load_recipe("digits")
    RunIdentity.create_or_load(run_dir, name=run, recipe_hash=recipe.hash, recipe=recipe.model_dump(mode="json"))
    Ledger().index(run_dir)
    return job_dir


def shoestring(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["shoestring", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code or 0


def test_the_ledger_knows_the_jobs_of_every_run(folder) -> None:
    for number, id in enumerate(("digits-aaaaaa", "digits-bbbbbb"), 1):
        submitted(folder, id, number=number)
    submitted(folder, "other-cccccc", number=9, run="other")
    assert [job["id"] for job in Ledger().jobs()] == ["other-cccccc", "digits-bbbbbb", "digits-aaaaaa"]
    assert [record.id for record in known_jobs()] == ["other-cccccc", "digits-bbbbbb", "digits-aaaaaa"]
    assert [record.id for record in records(folder / "elsewhere" / "digits")] == ["digits-aaaaaa", "digits-bbbbbb"]
    Ledger().delete("other")
    assert [job["id"] for job in Ledger().jobs()] == ["digits-bbbbbb", "digits-aaaaaa"]


def test_a_run_that_only_was_launched_is_listed(folder, monkeypatch, capsys) -> None:
    submitted(folder, "digits-aaaaaa")
    assert shoestring(monkeypatch, "runs", "list", "--json") == 0
    [run] = json.loads(capsys.readouterr().out)
    assert (run["name"], run["status"]) == ("digits", "launched")


def test_jobs_as_json(folder, monkeypatch, capsys) -> None:
    submitted(folder, "digits-aaaaaa", nodes=["n1"])
    assert shoestring(monkeypatch, "jobs", "--json") == 0
    [job] = json.loads(capsys.readouterr().out)
    assert (job["id"], job["state"], job["engine"], job["detail"]) == ("digits-aaaaaa", "finished", "local", "done")
    assert (job["seconds"], job["usd"], job["on"]) == (3600.0, 1.0, ["n1"])  # 2 tasks, 0.5 $ a device-hour
    assert [attempt["next"] for attempt in job["attempts"]] == ["finished"]
    assert shoestring(monkeypatch, "jobs", "digits-aaaaaa", "--json") == 0
    assert json.loads(capsys.readouterr().out) == job


def test_jobs_for_people(folder, monkeypatch, capsys) -> None:
    assert shoestring(monkeypatch, "jobs") == 0
    assert "no jobs yet: shoestring launch RECIPE --cluster FILE" in " ".join(capsys.readouterr().out.split())
    submitted(folder, "digits-aaaaaa")
    assert shoestring(monkeypatch, "jobs", "digits-a") == 0
    said = capsys.readouterr().out
    assert "digits-aaaaaa" in said and "finished" in said and "done" in said


@pytest.mark.parametrize("command", ["jobs", "logs", "cancel"])
def test_an_unknown_job_is_one_error_with_the_nearest(folder, monkeypatch, capsys, command) -> None:
    submitted(folder, "digits-aaaaaa")
    assert shoestring(monkeypatch, command, "digitz-aaaaaa") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no job 'digitz-aaaaaa'; did you mean digits-aaaaaa?" in said and "Traceback" not in said


def test_what_a_job_can_be_called(folder) -> None:
    known = [
        JobRecord(id, "slurm", engine_id, "/r", f"/r/jobs/{id}", 1.0, {})
        for id, engine_id in (("digits-aaaaaa", "17"), ("digits-abbbbb", "18"), ("17-cccccc", "19"))
    ]
    assert find("digits-aaaaaa", known).engine_id == "17"
    assert find("digits-aa", known).engine_id == "17"
    assert find("17", known).id == "digits-aaaaaa"  # an engine's own name before the start of ours
    assert find("17-", known).id == "17-cccccc"
    with pytest.raises(ClusterError, match="means 2 jobs: digits-aaaaaa, digits-abbbbb"):
        find("digits-a", known)
    for wanted in ("", "20"):
        with pytest.raises(ClusterError, match=f"no job '{wanted}'; there are digits-aaaaaa"):
            find(wanted, known)
    with pytest.raises(ClusterError, match="there are none"):
        find("x", [])


def test_a_job_whose_machine_died_is_not_running(folder) -> None:
    """Nobody has written an end, and the engine has nothing to run: failed, its time until it was last seen."""
    import socket

    job_dir = submitted(folder, "digits-aaaaaa", ended=None, next="", code=None)
    facts = json.loads((job_dir / "job.json").read_text())
    facts["record"]["engine_id"] = f"{socket.gethostname()}:1:0"  # no process has begun at 0
    (job_dir / "job.json").write_text(json.dumps(facts))
    status = launch.status(launch.load(job_dir))
    assert (status.state, status.attempts[-1].next) == ("failed", "lost")


def test_a_ledger_from_before_there_were_jobs(folder) -> None:
    job_dir = submitted(folder, "digits-aaaaaa")
    [path] = (folder / "home").glob("ledger.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE jobs")
        db.execute("UPDATE runs SET fingerprint='of its day'")  # jobs were no part of it
    ledger = Ledger()
    assert ledger.jobs() == [] and len(ledger.runs()) == 1
    ledger.index(job_dir.parents[1])
    assert [job["id"] for job in ledger.jobs()] == ["digits-aaaaaa"]


def test_history_of_a_job_without_attempts(folder) -> None:
    assert attempts.history(folder) == []
    assert records(folder) == []
