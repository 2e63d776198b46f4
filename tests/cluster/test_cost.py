"""What a job may cost: refused before it starts if it could be more, and never more over any number of attempts."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import a_cluster, a_job

from shoestring.cluster import ClusterError, attempts, launch, ranks
from shoestring.cluster.job import make_job, refuse_over_cap, worst_case
from shoestring.trainer.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
HOUR = 3600.0


def job_dir_with(folder: Path, **facts) -> Path:
    """The folder of a job of two tasks on two nodes."""
    job_dir = folder / "jobs" / "j"
    job_dir.mkdir(parents=True)
    told = {"nodes": 2, "devices_per_node": 1, "hours": 1.0, "attempt_hours": 1.0, "lead_seconds": 60, "requeues": 3}
    (job_dir / "job.json").write_text(json.dumps({**told, **facts}))
    return job_dir


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1_000_000.0
        monkeypatch.setattr(attempts.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def rank(number: int, code: int | None, ended: float = 2.0, error: str = "") -> ranks.RankRecord:
    return ranks.RankRecord(
        rank=number, node_rank=number, host=f"n{number}", pid=1, started=1.0, ended=ended, code=code, error=error
    )


def ended(job_dir: Path, *codes: int | None, number: int = 0, **how) -> tuple[str, int]:
    for index, code in enumerate(codes):
        ranks.write(job_dir, number, rank(index, code))
    return attempts.end(job_dir, number, how.pop("code", 1), **how)


# -- before the launch


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
    with pytest.raises(ClusterError, match="too dear for lab") as caught:
        refuse_over_cap(job)
    assert f"${spent:.2f} spent by earlier jobs of this run" in str(caught.value)


def test_spent_hours_are_read_from_the_run(tmp_path) -> None:
    for number, hours in enumerate((1.0, 0.5)):
        job_dir = tmp_path / "jobs" / f"j{number}"
        job_dir.mkdir(parents=True)
        own = {"id": f"j{number}", "engine": "local", "engine_id": "", "run_dir": str(tmp_path), "job_dir": "",
               "submitted": number}  # fmt: skip
        facts = {"nodes": 2, "devices_per_node": 4, "usd_per_device_hour": 0.25, "record": own}
        (job_dir / "job.json").write_text(json.dumps(facts))
        row = {"attempt": 0, "started": 0.0, "ended": hours * HOUR, "next": "finished", "code": 0}
        (job_dir / "attempts.jsonl").write_text(json.dumps(row) + "\n")
    assert launch.spent(tmp_path) == pytest.approx(1.5 * 8 * 0.25)


def test_a_cap_needs_a_price(tmp_path) -> None:
    cluster = a_cluster(tmp_path, "local", hardware="gb300", price={}, limits={"hours": 4, "usd": 10})
    with pytest.raises(ClusterError, match=r"cannot be kept without a price: set price\.usd_per_device_hour"):
        refuse_over_cap(a_job(tmp_path, cluster=cluster))
    unlimited = a_cluster(tmp_path, "local", hardware="gb300", price={}, limits={"hours": 4})
    assert "no price is known for gb300" in refuse_over_cap(a_job(tmp_path, cluster=unlimited))[0]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"nodes": 9}, "9 nodes; allowed on lab: at most 4 (limits.nodes)"),
        ({"devices_per_node": 3}, "3 devices; allowed on lab: at most 2 a node"),
        ({"hours": 5.0}, "5 h; allowed on lab: at most 4 h (limits.hours)"),
        ({"hours": 0.016}, "nothing would be trained"),
        ({"hours": 1.0, "lead_seconds": 1800}, "the last 1800 s are for saving"),
    ],
)
def test_limits(tmp_path, asked, said) -> None:
    cluster = a_cluster(tmp_path, "local", limits={"hours": 4, "nodes": 4})
    with pytest.raises(ClusterError) as caught:
        make_job(cluster, name="digits", recipe="", run_dir="/r", workdir="/w", **asked)
    assert all(word in str(caught.value) for word in said.split(" a node")[0].split(" devices;"))


def test_a_job_needs_hours(tmp_path) -> None:
    with pytest.raises(ClusterError, match="how long may the job take"):
        make_job(a_cluster(tmp_path, "local", limits={}), name="d", recipe="", run_dir="/r", workdir="/w")


def test_a_refused_job_leaves_nothing(tmp_path, monkeypatch) -> None:
    """Too dear, a secret that is missing, an engine that refuses: the run's folder does not come to be."""
    monkeypatch.delenv("LAB_TOKEN", raising=False)
    home = tmp_path / "runs" / "digits"
    cases = {
        "too dear": a_cluster(tmp_path, "local", limits={"hours": 400, "usd": 10}),
        "LAB_TOKEN is not set": a_cluster(tmp_path, "local"),
        "allowed with engine local: 1": a_cluster(tmp_path, "local", secrets={}),
    }
    for said, cluster in cases.items():
        nodes = 2 if "engine" in said else 1
        with pytest.raises(ClusterError, match=said):
            launch.submit(a_job(tmp_path, cluster=cluster, run_dir=str(home), nodes=nodes))
        assert not home.parent.exists()


# -- at the end of an attempt

ENDS = [0, 85, 86, 1, 137, None]  # what a task may leave behind; None: killed without a word


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("codes", list(itertools.product(ENDS, ENDS)), ids=str)
def test_every_pair_of_ends(tmp_path, clock, codes, cancelled) -> None:
    job_dir = job_dir_with(tmp_path)
    assert attempts.begin(job_dir, 0, ["n0", "n1"]) == 3600
    clock.now += 60
    after, code = ended(job_dir, *codes, cancelled=cancelled)
    if 86 in codes:
        expected = ("cancelled" if cancelled else "requeue", 86)
    elif set(codes) & {1, 137, None}:
        expected = ("cancelled" if cancelled else "failed", 1)
    elif 85 in codes:
        expected = ("cancelled" if cancelled else "requeue", 85)
    else:
        expected = ("finished", 0)
    assert (after, code) == expected
    [told] = attempts.history(job_dir)
    assert (told.next, told.code, told.seconds) == (after, code, 60)


@pytest.mark.parametrize(
    ("codes", "how", "expected"),
    [
        ((), {"code": 0}, ("failed", 1)),  # nobody came to start
        ((), {"code": 85}, ("requeue", 85)),  # … because the end came first
        ((0,), {"code": 0}, ("finished", 0)),  # a launcher that waits for all, and one record not yet seen
        ((0,), {"code": 1}, ("failed", 1)),
        ((1, 85), {"lost": ["n7"]}, ("requeue", 86)),  # who is left fails because somebody is gone
        ((85, 85), {"warned": True}, ("requeue", 85)),
    ],
)
def test_other_ends(tmp_path, clock, codes, how, expected) -> None:
    job_dir = job_dir_with(tmp_path)
    attempts.begin(job_dir, 0)
    assert ended(job_dir, *codes, **how) == expected
    assert attempts.excluded(job_dir) == how.get("lost", [])


def test_the_first_to_fail_is_told(tmp_path, clock, capsys) -> None:
    job_dir = job_dir_with(tmp_path)
    attempts.begin(job_dir, 0)
    ranks.write(job_dir, 0, rank(0, 1, ended=9.0, error="RuntimeError: connection closed by peer"))
    ranks.write(job_dir, 0, rank(1, 3, ended=4.0, error="ValueError: the cause"))
    assert attempts.end(job_dir, 0, 1) == ("failed", 3)
    said = capsys.readouterr().err
    assert "rank 1 on n1 was the first to fail, with exit code 3" in said and "then rank 0 on n0" in said
    assert "closed by peer" not in said


def test_bad_nodes_are_left_out(tmp_path, clock) -> None:
    job_dir = job_dir_with(tmp_path)
    for number, bad in enumerate((["n1"], ["n4", "n1"])):
        attempts.begin(job_dir, number)
        folder = ranks.attempt_dir(job_dir, number)
        folder.mkdir(parents=True)
        (folder / "preflight.json").write_text(json.dumps({"bad": bad}))
        assert ended(job_dir, 86, 86, number=number) == ("requeue", 86)
    assert attempts.excluded(job_dir) == ["n1", "n4"]


def test_requeues_have_an_end(tmp_path, clock) -> None:
    job_dir = job_dir_with(tmp_path, requeues=2)
    for number, after in enumerate(["requeue", "requeue", "exhausted"]):
        assert attempts.begin(job_dir, number) > 0
        clock.now += 10
        assert ended(job_dir, 85, 85, number=number) == (after, 85)
    assert "2 requeues are used up (limits.requeues)" in attempts.history(job_dir)[-1].reason


def test_hours_have_an_end(tmp_path, clock) -> None:
    job_dir = job_dir_with(tmp_path, attempt_hours=0.6)
    assert attempts.begin(job_dir, 0) == 0.6 * HOUR
    clock.now += 0.6 * HOUR
    assert ended(job_dir, 85, 85) == ("requeue", 85)
    assert attempts.begin(job_dir, 1) == pytest.approx(0.4 * HOUR, abs=1)
    clock.now += 0.39 * HOUR
    assert ended(job_dir, 85, 85, number=1) == ("exhausted", 85)
    assert attempts.begin(job_dir, 2) == 0, "whoever starts it again is sent away"
    assert attempts.history(job_dir)[-1].next == "exhausted"


def test_a_lost_attempt_counts_until_it_was_last_seen(tmp_path, clock) -> None:
    job_dir = job_dir_with(tmp_path)
    attempts.begin(job_dir, 0)
    journal = tmp_path / "events" / "rank-0.jsonl"
    journal.parent.mkdir()
    journal.write_text("{}\n")
    os.utime(journal, (clock.now + 600, clock.now + 600))
    clock.now += 2000  # in a queue, for the most part
    assert attempts.begin(job_dir, 1) == 3000
    first, second = attempts.history(job_dir)
    assert (first.next, first.seconds, second.next) == ("lost", 600, "")


def test_secrets_go_with_the_last_attempt(tmp_path, clock) -> None:
    job_dir = job_dir_with(tmp_path)
    for number, (code, kept) in enumerate([(85, True), (0, False)]):
        (job_dir / "secrets.sh").write_text("export A=b\n")
        attempts.begin(job_dir, number)
        ended(job_dir, code, code, number=number)
        assert (job_dir / "secrets.sh").exists() == kept


def test_a_torn_line_is_passed_over(tmp_path, clock) -> None:
    job_dir = job_dir_with(tmp_path)
    attempts.begin(job_dir, 0)
    with (job_dir / "attempts.jsonl").open("a") as log:
        log.write('{"attempt": 0, "ended": 12')
    assert [attempt.ended for attempt in attempts.history(job_dir)] == [None]


def spent(job_dir: Path) -> float:
    """Seconds of all attempts, none of which still runs."""
    history = attempts.history(job_dir)
    return attempts.spent_seconds(attempts.closed(job_dir, a) if a.ended is None else a for a in history)


@settings(max_examples=25)
@given(
    hours=st.floats(0.05, 5),
    share=st.floats(0.05, 1.0),
    lead=st.integers(30, 120),
    story=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([85, 86, 1, None]), st.floats(0, 1e5)), max_size=6),
)
def test_attempts_never_take_more_than_the_job_has(tmp_path_factory, hours, share, lead, story) -> None:
    """Whatever happens, as long as every attempt keeps to what `begin` gives it."""
    attempt_hours = max(hours * share, 3 * lead / HOUR)
    job_dir = job_dir_with(
        tmp_path_factory.mktemp("j"), hours=hours, attempt_hours=attempt_hours, lead_seconds=lead, requeues=100
    )
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        for number, (used, code, queued) in enumerate(story):
            left = hours * HOUR - spent(job_dir)
            allowed = attempts.begin(job_dir, number)
            assert allowed <= left and allowed <= attempt_hours * HOUR
            if not allowed:
                break
            clock.now += used * allowed
            if code is None:  # its machine dies; its tasks had just written something
                ranks.write(job_dir, number, rank(0, None))
                seen = ranks.attempt_dir(job_dir, number) / "rank-00000.json"
                os.utime(seen, (clock.now, clock.now))
            else:
                ended(job_dir, code, code, number=number)
            clock.now += queued
        assert spent(job_dir) <= hours * HOUR + 1e-3


def test_the_script_is_told_in_two_words(tmp_path, capsys) -> None:
    """As scripts call it."""
    job_dir = job_dir_with(tmp_path)
    assert attempts.main(["begin", str(job_dir), "--attempt", "0", "--nodes", "n0,n1"]) == 0
    assert int(capsys.readouterr().out) == 3600
    for index in (0, 1):
        ranks.write(job_dir, 0, rank(index, 85))
    assert attempts.main(["end", str(job_dir), "--attempt", "0", "--code", "1"]) == 0
    assert capsys.readouterr().out == "requeue 85\n"
    assert attempts.history(job_dir)[0].nodes == ("n0", "n1")
    assert yaml.safe_load((job_dir / "job.json").read_text())["hours"] == 1
