"""The attempts of a job: what is decided at the end of each, and that all of them keep within the job's hours."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.cluster.node import attempts, ranks

HOUR = 3600.0


def job_dir_with(folder: Path, **facts) -> Path:
    """The folder of a job of two tasks on two nodes."""
    job_dir = folder / "jobs" / "j"
    job_dir.mkdir(parents=True)
    facts_of_job = {
        "nodes": 2,
        "devices_per_node": 1,
        "hours": 1.0,
        "attempt_hours": 1.0,
        "lead_seconds": 60,
        "requeues": 3,
    }
    (job_dir / "job.json").write_text(json.dumps({**facts_of_job, **facts}))
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


ENDS = [0, 85, 86, 1, 137, None]  # what a task may leave behind; None: no exit record


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
    [attempt] = attempts.history(job_dir)
    assert (attempt.next, attempt.code, attempt.seconds) == (after, code, 60)


@pytest.mark.parametrize(
    ("codes", "how", "expected"),
    [
        ((), {"code": 0}, ("failed", 1)),  # no task started
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


def test_the_first_to_fail_is_named(tmp_path, clock, capsys) -> None:
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

    # nor does what the run writes afterwards count for it, in the next attempt or in another job of the run
    (journal.parent / "rank-0-again.jsonl").write_text("{}\n")
    os.utime(journal.parent / "rank-0-again.jsonl", (clock.now + 900, clock.now + 900))
    assert attempts.history(job_dir)[0].seconds == 600
    assert attempts.closed(job_dir, second).seconds == 900
    other = job_dir.parent / "other"
    other.mkdir()
    (other / "attempts.jsonl").write_text(json.dumps({"attempt": 0, "started": clock.now + 800}) + "\n")
    assert attempts.closed(job_dir, second).seconds == 0


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


def test_the_script_reads_two_words(tmp_path, capsys) -> None:
    """As scripts call it."""
    job_dir = job_dir_with(tmp_path)
    assert attempts.main(["begin", str(job_dir), "--attempt", "0", "--nodes", "n0,n1"]) == 0
    assert int(capsys.readouterr().out) == 3600
    for index in (0, 1):
        ranks.write(job_dir, 0, rank(index, 85))
    assert attempts.main(["end", str(job_dir), "--attempt", "0", "--code", "1"]) == 0
    assert capsys.readouterr().out == "requeue 85\n"
    assert attempts.history(job_dir)[0].nodes == ("n0", "n1")
