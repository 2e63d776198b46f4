"""The ledger is an index: whatever it says comes from the journals, and comes again after a rebuild."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from shoestring import ShoestringError
from shoestring.trainer.ledger import Journal, Ledger, LedgerError, RunIdentity, write_summary
from shoestring.trainer.ledger.identity import IdentityError

START = {"event": "start", "hardware": "cpu", "strategy": "zero1", "world_size": 2, "techniques": ["lr_scaling"]}


def attempt(run_dir, number, steps, *events, rank=0, start=START):
    with Journal(run_dir / "events", rank=rank, attempt=number) as journal:
        journal.write("event", **start)
        for step in steps:
            totals = {"usd": step * 0.5, "tokens": step * 100, "seconds": step * 2.0, "peak_bytes": 1000 + rank}
            journal.write("step", step=step, loss=10.0 - step, attempt=number, **totals)
        for event in events:
            journal.write("event", **event)


@pytest.fixture
def run_dir(tmp_path):
    """A run that was preempted after step 6, had saved step 4, and finished at step 9."""
    folder = tmp_path / "runs" / "first"
    RunIdentity.create_or_load(folder, name="first", recipe_hash="abcd", recipe={"seed": 1})
    attempt(folder, 0, range(1, 7), {"event": "checkpoint"}, {"event": "preempted", "stopped_by": "SIGTERM"})
    attempt(folder, 1, range(5, 10), {"event": "stop", "stopped_by": "steps", "metrics": {"val_loss": 1.5}})
    attempt(folder, 1, [9], rank=1)
    with Journal(folder / "events", rank=0, attempt=1) as journal:
        journal.write("claim", technique="lr_scaling", saves=["steps"])
        journal.write("estimate", usd=999.0, steps=999, seconds=999.0)
        journal.write("measurement", window="step 3", usd=777.0, seconds=777.0)
        journal.write("verdict", goal="val_loss < 2", reached=True, usd=888.0)
    return folder


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "home" / "ledger.sqlite")


def contents(ledger):
    with closing(sqlite3.connect(ledger.path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table' ORDER BY name")]
        return {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in tables}


def test_missing_ledger_is_empty_and_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    ledger = Ledger()
    assert ledger.path == tmp_path / "home" / "ledger.sqlite"
    assert ledger.runs() == []
    with pytest.raises(LedgerError, match="is empty"):
        ledger.run("x")
    assert list(tmp_path.iterdir()) == []


def test_index_describes_the_run_and_keeps_the_kinds_apart(ledger, run_dir):
    identifier = ledger.index(run_dir)
    run = ledger.run("first")
    assert (run.id, run.run_dir, run.recipe_hash) == (identifier, str(run_dir), "abcd")
    assert (run.status, run.attempts, run.stopped_by) == ("finished", 2, "steps")
    assert (run.steps, run.tokens, run.usd, run.seconds) == (9, 900, 4.5, 18.0)  # no estimate, no window of a part
    assert run.peak_bytes == 1001  # the largest on any rank
    assert (run.hardware, run.strategy, run.world_size, run.techniques) == ("cpu", "zero1", 2, ["lr_scaling"])
    assert run.metrics == {"loss": 1.0, "attempt": 1, "val_loss": 1.5} and run.mfu is None and run.problems == 0

    (claim,), (estimate,) = ledger.claims(run.id), ledger.estimates(run.id)
    (measurement,), (verdict,) = ledger.measurements(run.id), ledger.verdicts(run.id)
    assert claim.fields == {"technique": "lr_scaling", "saves": ["steps"]} and estimate.fields["usd"] == 999.0
    assert measurement.fields["usd"] == 777.0 and verdict.fields["reached"] is True
    events = [(row.attempt, row.fields["event"]) for row in ledger.events(run.id) if row.rank == 0]
    assert events == [(0, "start"), (0, "checkpoint"), (0, "preempted"), (1, "start"), (1, "stop")]

    steps = ledger.steps("first")
    assert [row.fields["step"] for row in steps] == list(range(1, 10))
    assert [row.fields["attempt"] for row in steps] == [0] * 4 + [1] * 5  # redone steps count as they were redone
    assert len(ledger.steps("first", redone=True)) == 11


def test_summary_fills_gaps_and_wins_unless_it_is_older(ledger, run_dir):
    write_summary(run_dir, {"steps": 6, "usd": 3.0, "kwh": 0.25, "kwh_source": "estimated", "mfu": float("nan")})
    ledger.index(run_dir)
    run = ledger.run("first")
    assert (run.usd, run.kwh, run.kwh_source, run.mfu) == (4.5, 0.25, "estimated", None)
    write_summary(run_dir, {"steps": 9, "usd": 4.75, "flops_counted": 10**30, "tokens": 2**70, "metrics": {"acc": 1}})
    ledger.index(run_dir)
    run = ledger.run("first")
    assert (run.usd, run.flops_counted, run.tokens, run.metrics["acc"]) == (4.75, 1e30, float(2**70), 1)


RUNNING = """
import os, sys
from pathlib import Path
from shoestring.trainer.ledger import Journal
journal = Journal(Path(sys.argv[1]) / "events", rank=0, attempt=2)
journal.write("event", event="resume")
print("ready", flush=True)
sys.stdin.read()
"""


def test_status_follows_events_and_life(ledger, run_dir):
    command = [sys.executable, "-c", RUNNING, str(run_dir)]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "ready\n"
    ledger.index(run_dir)
    assert (ledger.run("first").status, ledger.run("first").stopped_by) == ("running", None)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    ledger.refresh()
    assert (ledger.run("first").status, ledger.run("first").stopped_by) == ("failed", "died")
    for number, (events, status) in enumerate(
        [
            ([{"event": "preempted"}, {"event": "stop"}], "preempted"),
            ([{"event": "error", "message": "x"}], "failed"),
            ([{"event": "replan"}, {"event": "stop"}], "finished"),
        ],
        start=3,
    ):
        attempt(run_dir, number, [], *events)
        ledger.index(run_dir)
        assert ledger.run("first").status == status
    assert [run.id for run in ledger.runs(status="finished")] == [ledger.run("first").id]


def test_index_does_nothing_when_nothing_changed_and_counts_damage(ledger, run_dir):
    identifier = ledger.index(run_dir)
    with closing(sqlite3.connect(ledger.path)) as db:
        db.execute("UPDATE runs SET usd=1e6")
        db.commit()
    assert ledger.index(run_dir) == identifier and ledger.run("first").usd == 1e6
    ledger.index(run_dir, force=True)
    assert ledger.run("first").usd == 4.5
    segment = run_dir / "events" / "events-a0000-r00000.jsonl"
    segment.write_bytes(segment.read_bytes().replace(b'"step":2,', b'"step":7,') + b'{"seq":')
    ledger.index(run_dir)
    assert ledger.run("first").problems == 2 and len(ledger.steps("first", redone=True)) == 10


def test_finding_a_run(ledger, tmp_path):
    folders = [tmp_path / "runs" / name for name in ("a", "b", "c")]
    names = ["wide", "wide", "narrow"]
    ids = ["aa0000000000", "aa1111111111", "bb0000000000"]
    for folder, name, identifier in zip(folders, names, ids, strict=True):
        folder.mkdir(parents=True)
        identity = {"id": identifier, "name": name, "created": float(ids.index(identifier)), "recipe_hash": name}
        (folder / "run.json").write_text(json.dumps(identity))
        ledger.index(folder)
    assert [run.id for run in ledger.runs()] == ids[::-1] and [run.id for run in ledger.runs(limit=1)] == ids[2:]
    assert [run.id for run in ledger.runs(recipe_hash="wide")] == [ids[1], ids[0]]
    with pytest.raises(LedgerError, match=rf"'wide': 2 runs are called so: {ids[1]} .*, {ids[0]} .*Give an id"):
        ledger.run("wide")
    assert ledger.run("bb").id == ids[2] and ledger.run(str(folders[0])).id == ids[0]
    with pytest.raises(LedgerError, match=r"'aa': 2 runs begin so: aa1111111111 .*, aa0000000000 .*Give an id"):
        ledger.run("aa")
    with pytest.raises(ShoestringError, match=r"no run 'narow' .* Did you mean 'narrow'\?"):
        ledger.steps("narow")
    with pytest.raises(IdentityError, match=r"is not a run directory"):
        ledger.index(tmp_path)
    assert ledger.runs()[0].status == "unknown"


def test_a_copy_of_a_run_displaces_nothing(ledger, run_dir, tmp_path):
    original = ledger.index(run_dir)
    copy = tmp_path / "runs" / "a-copy"
    shutil.copytree(run_dir, copy)
    attempt(copy, 2, range(10, 13), {"event": "stop", "stopped_by": "usd"})
    second = ledger.index(copy)
    assert second != original and ledger.index(copy) == second
    assert {run.id: (run.run_dir, run.steps) for run in ledger.runs()} == {
        original: (str(run_dir), 9), second: (str(copy), 12)
    }  # fmt: skip
    before = contents(ledger)
    ledger.path.unlink()
    ledger.rebuild([tmp_path / "runs"])
    assert contents(ledger) == before, "the older directory is the original again"
    ledger.delete(second, files=True)
    assert not copy.exists() and [run.id for run in ledger.runs()] == [original]
    run_dir.rename(copy)
    assert ledger.index(copy) == original and ledger.run(original).run_dir == str(copy), "moved, not copied"


def test_one_run_among_many_is_found_without_reading_them_all(ledger, run_dir):
    """Asked for by id, start of an id, name or folder: a query each, whatever else there is."""
    wanted = ledger.index(run_dir)
    metrics = json.dumps({f"metric {n}": 1.0 for n in range(40)})
    with closing(sqlite3.connect(ledger.path)) as db:
        for n in range(20_000):
            db.execute(
                "INSERT INTO runs (id, name, run_dir, created, metrics, techniques) VALUES (?, ?, ?, ?, ?, '[]')",
                (f"-{n}", f"other {n}", f"/other/{n}", n, metrics),
            )
        db.commit()
    began = time.process_time()
    assert {ledger.run(name).id for name in (wanted, wanted[:6], "first", str(run_dir))} == {wanted}
    for kind in ("claims", "estimates", "measurements", "verdicts", "events"):
        getattr(ledger, kind)(wanted)
    spent = time.process_time() - began
    print(f"one of 20,001 runs: {spent:.2f} CPU-s")
    assert spent < 1.0


def test_delete_forgets_and_removes_files_only_on_request(ledger, run_dir):
    identifier = ledger.index(run_dir)
    assert ledger.delete("first").id == identifier and run_dir.exists()
    assert all(rows == [] for rows in contents(ledger).values())
    ledger.index(run_dir)
    (run_dir / "run.json").write_text(json.dumps({"id": "another", "name": "x"}))
    with pytest.raises(LedgerError, match="belongs to another run"):
        ledger.delete("first", files=True)
    (run_dir / "run.json").write_text(json.dumps({"id": identifier, "name": "first"}))
    ledger.delete("first", files=True)
    assert not run_dir.exists() and ledger.runs() == []


def test_rebuild_gives_the_same_ledger_even_from_a_damaged_file(ledger, run_dir, tmp_path):
    second = tmp_path / "runs" / "deeper" / "second"
    RunIdentity.create_or_load(second, name="second")
    attempt(second, 0, range(3))
    write_summary(second, {"steps": 3})
    for folder in (run_dir, second):
        ledger.index(folder)
    before = contents(ledger)
    assert len(before["runs"]) == 2 and len(before["steps"]) == 14
    assert sorted(ledger.rebuild()) == sorted(run.id for run in ledger.runs()) and contents(ledger) == before

    content = ledger.path.read_bytes()
    ledger.path.write_bytes(b"no database" + content[11:])
    with pytest.raises(LedgerError, match="only an index: `shoestring runs rebuild`"):
        ledger.runs()
    ledger.rebuild([tmp_path / "runs"])
    assert contents(ledger) == before and ledger.path.with_name("ledger.sqlite.damaged").exists()

    with closing(sqlite3.connect(ledger.path)) as db:
        db.execute("INSERT INTO runs (id, name, run_dir, created) VALUES ('gone', 'gone', '/nowhere', 1)")
        db.execute("PRAGMA user_version=99")
        db.commit()
    with pytest.raises(LedgerError, match="version 99"):
        ledger.runs()
    ledger.rebuild([tmp_path / "runs"])
    assert contents(ledger) == before


INDEXER = """
import sys
from pathlib import Path
from shoestring.trainer.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for _ in range(8):
    for folder in sys.argv[2:]:
        ledger.index(Path(folder), force=True)
    assert len(ledger.runs()) >= 1
"""


def test_concurrent_indexers_agree(ledger, run_dir, tmp_path):
    second = tmp_path / "runs" / "second"
    RunIdentity.create_or_load(second, name="second")
    attempt(second, 0, range(50))
    folders = [str(run_dir), str(second)]
    command = [sys.executable, "-c", INDEXER, str(ledger.path)]
    indexers = [
        subprocess.Popen([*command, *order], stderr=subprocess.PIPE, text=True)
        for order in (folders, folders[::-1], folders, folders[::-1])
    ]
    assert [indexer.communicate(timeout=60)[1] for indexer in indexers] == [""] * 4
    alone = Ledger(tmp_path / "alone.sqlite")
    for folder in folders:
        alone.index(Path(folder))
    assert contents(ledger) == contents(alone)


def test_write_ahead_log_or_not(ledger, run_dir, tmp_path):
    ledger.index(run_dir)
    plain = Ledger(tmp_path / "plain" / "ledger.sqlite")
    (tmp_path / "plain" / "ledger.sqlite-shm").mkdir(parents=True)  # where SQLite wants its shared memory
    plain.index(run_dir)
    assert plain.runs() == ledger.runs() and plain.steps("first") == ledger.steps("first")
    modes = []
    for path in (ledger.path, plain.path):
        with closing(sqlite3.connect(path)) as db:
            modes.append(db.execute("PRAGMA journal_mode").fetchone()[0])
    assert modes == ["wal", "delete"]


CREATOR = """
import sys
from pathlib import Path
from shoestring.trainer.ledger import RunIdentity
sys.stdin.readline()
print(RunIdentity.create_or_load(Path(sys.argv[1]), name="x", recipe_hash="h", recipe={"a": [1, 2.5]}).id)
"""


@pytest.mark.parametrize("before", [None, "", '{"id": '])
def test_all_ranks_get_one_identity_new_or_instead_of_a_damaged_one(tmp_path, before):
    folder = tmp_path / "run"
    if before is not None:
        folder.mkdir()
        (folder / "run.json").write_text(before)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", CREATOR, str(folder)], **pipes) for _ in range(4)]
    for rank in ranks:
        rank.stdin.write("go\n")
        rank.stdin.flush()
    ids = {rank.communicate(timeout=30)[0].strip() for rank in ranks}
    identity = RunIdentity.load(folder)
    assert ids == {identity.id} and len(identity.id) == 12
    assert identity.recipe == {"a": [1, 2.5]} and "torch" in identity.versions and identity.created > 1e9
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    (tmp_path / "run.json").write_text('{"id": ')
    (tmp_path / "checkpoints" / "000000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "000000003" / "manifest.json").write_text("{")
    with pytest.raises(IdentityError, match=r"run\.json cannot be read"):
        RunIdentity.create_or_load(tmp_path, name="x")
    assert (tmp_path / "run.json").read_text() == '{"id": '
