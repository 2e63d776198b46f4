"""What a job may cost: refused before it starts if it could be more, and then nothing is left of it."""

from __future__ import annotations

import json
import os
import time

import pytest
from jobs import a_cluster, a_job

from shoestring.cluster import ClusterError, launch
from shoestring.cluster.job import make_job, refuse_over_cap, worst_case
from shoestring.trainer.cli.app import main

pytestmark = pytest.mark.filterwarnings("ignore")
HOUR = 3600.0


def test_the_worst_case_is_shown_and_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"limits": {"hours": 30, "usd": 10}, "devices_per_node": 2, "secrets": {}}
    a_cluster(tmp_path, "local", **values, nodes=1)
    with pytest.raises(SystemExit) as caught:
        monkeypatch.setattr("sys.argv", ["shoestring", "launch", "digits", "--cluster", "local.yaml"])
        main()
    assert caught.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "1 nodes x 2 devices x 30 h x $0.5 a device-hour = $30.00 at most" in said
    assert "the cap is $10.00 (limits.usd). --hours 10 would fit." in said
    assert [path.name for path in tmp_path.iterdir()] == ["local.yaml"]


@pytest.mark.parametrize(("spent", "fits"), [(0.0, True), (4.0, True), (4.01, False), (100.0, False)])
def test_what_earlier_jobs_have_spent_counts(tmp_path, spent, fits) -> None:
    cluster = a_cluster(tmp_path, "local", limits={"hours": 6, "usd": 10})
    job = a_job(tmp_path, cluster=cluster, hours=6, spent_usd=spent)
    assert worst_case(job)[0] == pytest.approx(spent + 6.0)
    if fits:
        assert refuse_over_cap(job)[-1] == "the cap is $10.00: within it"
        return
    with pytest.raises(ClusterError, match="too expensive for lab") as caught:
        refuse_over_cap(job)
    assert f"${spent:.2f} spent by earlier jobs of this run" in str(caught.value)


@pytest.fixture
def attempted(tmp_path):
    """Write down a job of eight devices at $0.25 an hour, and its one attempt."""

    def write(id, **row):
        job_dir = tmp_path / "jobs" / id
        job_dir.mkdir(parents=True)
        own = {"id": id, "engine": "local", "engine_id": "", "run_dir": str(tmp_path), "job_dir": "", "submitted": 0}
        facts = {"nodes": 2, "devices_per_node": 4, "usd_per_device_hour": 0.25, "record": own}
        (job_dir / "job.json").write_text(json.dumps(facts))
        (job_dir / "attempts.jsonl").write_text(json.dumps({"attempt": 0, **row}) + "\n")

    return write


def test_spent_hours_are_read_from_the_run(tmp_path, attempted) -> None:
    for number, hours in enumerate((1.0, 0.5)):
        attempted(f"j{number}", started=0.0, ended=hours * HOUR, next="finished", code=0)
    assert launch.spent(tmp_path) == pytest.approx(1.5 * 8 * 0.25)


def test_an_attempt_that_never_said_that_it_ended_costs_until_it_was_last_seen(tmp_path, attempted) -> None:
    now = time.time()
    attempted("died", started=now - 100 * HOUR)
    (tmp_path / "events").mkdir()
    journal = tmp_path / "events" / "00000.jsonl"
    journal.touch()
    os.utime(journal, (now, now - 97 * HOUR))
    assert launch.spent(tmp_path) == pytest.approx(3 * 8 * 0.25)


def test_a_cap_needs_a_price(tmp_path) -> None:
    cluster = a_cluster(tmp_path, "local", hardware="gb300", price={}, limits={"hours": 4, "usd": 10})
    with pytest.raises(ClusterError, match=r"cannot be checked without a price: set price\.usd_per_device_hour"):
        refuse_over_cap(a_job(tmp_path, cluster=cluster))
    unlimited = a_cluster(tmp_path, "local", hardware="gb300", price={}, limits={"hours": 4})
    assert "no price is known for gb300" in refuse_over_cap(a_job(tmp_path, cluster=unlimited))[0]


@pytest.mark.parametrize(
    ("requested", "said"),
    [
        ({"nodes": 9}, "9 nodes; allowed on lab: at most 4 (limits.nodes)"),
        ({"devices_per_node": 3}, "3 devices; allowed on lab: at most 2 a node"),
        ({"hours": 5.0}, "5 h; allowed on lab: at most 4 h (limits.hours)"),
        ({"hours": 0.016}, "nothing would be trained"),
        ({"hours": 1.0, "lead_seconds": 1800}, "the last 1800 s are for saving"),
    ],
)
def test_limits(tmp_path, requested, said) -> None:
    cluster = a_cluster(tmp_path, "local", limits={"hours": 4, "nodes": 4})
    with pytest.raises(ClusterError) as caught:
        make_job(cluster, name="digits", recipe="", run_dir="/r", workdir="/w", **requested)
    assert all(word in str(caught.value) for word in said.split(" a node")[0].split(" devices;"))


def test_a_job_needs_hours(tmp_path) -> None:
    with pytest.raises(ClusterError, match="how long may the job take"):
        make_job(a_cluster(tmp_path, "local", limits={}), name="d", recipe="", run_dir="/r", workdir="/w")


def test_a_refused_job_leaves_nothing(tmp_path, monkeypatch) -> None:
    """Too expensive, a secret that is missing, an engine that refuses: the run's folder does not come to be."""
    monkeypatch.delenv("LAB_TOKEN", raising=False)
    home = tmp_path / "runs" / "digits"
    cases = {
        "too expensive": a_cluster(tmp_path, "local", limits={"hours": 400, "usd": 10}),
        "LAB_TOKEN is not set": a_cluster(tmp_path, "local"),
        "allowed with engine local: 1": a_cluster(tmp_path, "local", secrets={}),
    }
    for said, cluster in cases.items():
        nodes = 2 if "engine" in said else 1
        with pytest.raises(ClusterError, match=said):
            launch.submit(a_job(tmp_path, cluster=cluster, run_dir=str(home), nodes=nodes))
        assert not home.parent.exists()
