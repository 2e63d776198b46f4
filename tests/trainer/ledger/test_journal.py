"""The journal's promises: what `write` has taken is read again, whatever happens to process, file or disk."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoestring.trainer.ledger import Journal, JournalError, next_attempt, read
from shoestring.trainer.ledger.lines import seal

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
FIELDS = st.dictionaries(st.text(max_size=8), SCALARS | st.lists(SCALARS, max_size=3), max_size=4)
SAFE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def started(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def segment(directory, rows, attempt=0, rank=0):
    """A segment with these rows, each a dict, written as the journal would."""
    heads = (json.dumps({"seq": n, "t": 1.5, "mono": 0.5, "kind": "step", **row})[:-1] for n, row in enumerate(rows))
    path = directory / f"events-a{attempt:04d}-r{rank:05d}.jsonl"
    directory.mkdir(exist_ok=True)
    path.write_bytes(b"".join(map(seal, heads)))
    return path


def expected(value):
    """What JSON keeps of a value."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [expected(item) for item in value] if isinstance(value, list) else value


@SAFE
@given(rows=st.lists(FIELDS, max_size=5))
def test_rows_come_back_and_lines_are_json(tmp_path_factory, rows):
    directory = tmp_path_factory.mktemp("journal")
    with Journal(directory, rank=0, attempt=0) as journal:
        for row in rows:
            journal.write("event", **row)
    problems = []
    read_back = list(read(directory, problems))
    reserved = ("seq", "t", "mono", "kind", "crc")
    wanted = [{k + "_" * (k in reserved): expected(v) for k, v in row.items()} for row in rows]
    assert [row.fields for row in read_back] == wanted and not problems
    assert [row.seq for row in read_back] == list(range(len(rows)))
    for line in journal.path.read_text().splitlines():
        assert json.loads(line)["kind"] == "event"


def test_foreign_values_and_unknown_kinds(tmp_path):
    import numpy

    circle = []
    circle.append(circle)
    with Journal(tmp_path, rank=0, attempt=0) as journal:
        journal.write("step", a=numpy.float32(0.5), b=numpy.arange(2), c={"x"}, d=Path("/x"), e={1: numpy.nan}, step=3)
        journal.write("step", bad=circle)
        with pytest.raises(JournalError, match=r"'steps'.*choose one of.*measurement"):
            journal.write("steps", loss=1.0)
    first, second = read(tmp_path)
    assert first.fields == {"a": 0.5, "b": [0, 1], "c": ["x"], "d": "/x", "e": {"1": None}, "step": 3}
    assert "Recursion" in second.fields["unwritable"]


@SAFE
@given(rows=st.lists(FIELDS, min_size=1, max_size=5), data=st.data())
def test_cut_anywhere_earlier_rows_are_read_and_writing_goes_on(tmp_path_factory, rows, data):
    directory = tmp_path_factory.mktemp("journal")
    rows = [expect(row) for row in rows]
    path = segment(directory, [{"row": row} for row in rows])
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    os.truncate(path, cut)
    complete = whole[:cut].count(b"\n")
    problems = []
    assert [row.fields["row"] for row in read(directory, problems)] == rows[:complete]
    torn = not whole[:cut].endswith(b"\n") and cut > 0
    assert [str(problem.what).startswith("the last line is cut off") for problem in problems] == [True] * torn
    with Journal(directory, rank=0, attempt=0) as journal:
        journal.write("step", row="after")
    problems.clear()
    assert [row.fields["row"] for row in read(directory, problems)][complete:] == ["after"]
    assert [row.seq for row in read(directory)] == list(range(complete + 1)) and not problems


def expect(row):
    return json.loads(json.dumps({key: expected(value) for key, value in row.items()}))


def test_flip_of_any_bit_costs_one_row_and_is_reported(tmp_path):
    path = segment(tmp_path, [{"loss": 1.25, "note": f"row {n}"} for n in range(3)])
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(whole):
            hit = whole[:position].count(b"\n")
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                problems = []
                rows = list(read(tmp_path, problems))
                assert [row.seq for row in rows] == [n for n in range(3) if n != hit]
                assert all(row.fields == {"loss": 1.25, "note": f"row {row.seq}"} for row in rows)
                assert problems and all(hit < problem.line <= hit + 2 for problem in problems)
            os.pwrite(file.fileno(), bytes([byte]), position)


def test_lost_and_doubled_lines_are_reported(tmp_path):
    path = segment(tmp_path, [{"n": n} for n in range(6)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[3], lines[1], lines[4]]))
    problems = []
    assert [row.seq for row in read(tmp_path, problems)] == [0, 3, 4]
    assert [problem.what for problem in problems] == [
        "2 rows before row 3 are lost",
        "row 1 comes after row 3; left out",
    ]


def test_order_is_by_attempt_and_seq_whatever_the_clock_says(tmp_path):
    assert next_attempt(tmp_path / "none") == 0 and not (tmp_path / "none").exists()
    segment(tmp_path, [{"n": 20}, {"n": 21}], attempt=1)
    segment(tmp_path, [{"n": 10}, {"n": 11}], attempt=0)
    segment(tmp_path, [{"n": 30}], attempt=0, rank=1)
    assert [(row.rank, row.attempt, row.fields["n"]) for row in read(tmp_path)] == [
        (0, 0, 10), (0, 0, 11), (0, 1, 20), (0, 1, 21), (1, 0, 30),
    ]  # fmt: skip
    assert [row.fields["n"] for row in read(tmp_path, rank=1)] == [30]
    assert next_attempt(tmp_path) == 2


WRITER = """
import sys
from pathlib import Path
from shoestring.trainer.ledger import Journal, lock
lock.PATIENCE = 0.3
journal = Journal(Path(sys.argv[1]), rank=0, attempt=int(sys.argv[2]))
for n in range(10**9):
    journal.write("step", n=n, pad="x" * (n % 97))
    print(n, flush=True)
"""


def test_kill_9_loses_no_acknowledged_row_and_one_process_writes(tmp_path):
    writer = started(WRITER, tmp_path, 0)
    for _ in range(200):
        acknowledged = int(writer.stdout.readline())
    rival = started(WRITER, tmp_path, 1)
    _, err = rival.communicate(timeout=30)
    assert rival.returncode == 1 and f"is being written by process {writer.pid} on" in err and "RunBusy" in err
    writer.send_signal(signal.SIGKILL)
    tail = writer.communicate()[0].split()
    acknowledged = int(tail[-2]) if len(tail) > 1 else acknowledged
    numbers = [row.fields["n"] for row in read(tmp_path)]
    assert numbers == list(range(len(numbers))) and len(numbers) > acknowledged
    with Journal(tmp_path, rank=0, attempt=1) as journal:  # the lock died with its holder
        journal.write("event", event="resume")
    assert list(read(tmp_path))[-1].fields == {"event": "resume"}


LIMITED = """
import logging, resource, signal, sys
from pathlib import Path
from shoestring.trainer.ledger import Journal
journal = Journal(Path(sys.argv[1]), rank=0, attempt=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for n in range(1000):
    journal.write("step", n=n)
held = len(journal._waiting)
if sys.argv[2] == "freed":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(held, journal.sync(), journal.close(), journal.lost)
"""


@pytest.mark.parametrize("ending", ["freed", "full"])
def test_full_disk_never_raises_and_says_what_was_lost(tmp_path, ending):
    writer = started(LIMITED, tmp_path, ending)
    out, err = writer.communicate(timeout=30)
    assert writer.returncode == 0, err
    held, synced, closed, lost = out.split()
    problems = []
    numbers = [row.fields["n"] for row in read(tmp_path, problems)]
    assert int(held) > 500 and not problems and numbers == list(range(len(numbers)))
    assert err.count("Training continues") == 1
    if ending == "freed":
        assert (synced, closed, len(numbers)) == ("True", "0", 1000)
    else:
        assert (synced, closed) == ("False", lost) and len(numbers) + int(lost) == 1000
        assert f"{lost} rows were lost" in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "shoestring-test", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_file_system_rows_wait_for_room(small_disk, caplog, monkeypatch):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    monkeypatch.setattr("shoestring.trainer.ledger.journal.BUFFER_BYTES", 20_000)
    with Journal(small_disk / "events", rank=0, attempt=0, fsync_every=0.05) as journal:
        for n in range(900):
            journal.write("step", n=n, pad="x" * 20)
        dropped = journal.lost
        assert dropped > 100  # more than fits into the bounded memory
        ballast.unlink()
        deadline = time.monotonic() + 10
        while journal._waiting and time.monotonic() < deadline:
            time.sleep(0.02)  # the background thread tries again by itself
    problems = []
    numbers = [row.fields["n"] for row in read(small_disk / "events", problems)]
    assert numbers[-1] == 899 and len(numbers) == 900 - dropped  # the newest were kept
    early = next(place for place, n in enumerate(numbers) if place != n)
    assert [problem.what for problem in problems] == [f"{dropped} rows before row {early + dropped} are lost"]
    assert caplog.text.count("Training continues") == 1 and f"{dropped} rows were lost" in caplog.text


def test_fsync_is_paced_and_sync_is_now(tmp_path, monkeypatch):
    calls = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(time.monotonic()), real(descriptor)))
    journal = Journal(tmp_path, rank=0, attempt=0, fsync_every=0.1)
    began, opening = time.monotonic(), len(calls)
    while time.monotonic() < began + 0.55:
        journal.write("step", n=1)
    paced = len(calls) - opening
    assert 1 <= paced <= 6
    assert journal.sync() and len(calls) >= opening + paced + 1
    journal.close()
    assert journal.close() == 0
    journal.write("step", n=2)  # too late, but no reason to stop a training
    assert journal.lost == 1
    with Journal(tmp_path, rank=1, attempt=0, fsync_every=0) as careful:
        calls.clear()
        careful.write("step", n=1)
        assert len(calls) == 1


def test_a_row_costs_fifteen_calls(tmp_path):
    calls = []
    row = {f"metric_{n}": 1.0 / (n + 3) for n in range(12)}
    with Journal(tmp_path, rank=0, attempt=0) as journal:
        journal.write("step", **row)
        sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
        journal.write("step", **row)
        sys.setprofile(None)
        began = time.process_time()
        for _ in range(2000):
            journal.write("step", **row)
        seconds = (time.process_time() - began) / 2000
    assert len(calls) - 1 <= 16  # less the call that ends the count
    assert seconds < 100e-6


def test_unwritable_place_is_reported_before_anything_is_spent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"cannot write the journal .*choose another run directory"):
        Journal(tmp_path / "file" / "events", rank=0, attempt=0)


def test_ledger_imports_without_heavy_packages():
    code = """
import sys, time
import shoestring.trainer
began = time.process_time()
from shoestring.trainer.ledger import Journal, Ledger, RunIdentity, WandbSink
heavy = {"torch", "wandb", "numpy", "pydantic", "psutil", "pytorch_lightning"} & sys.modules.keys()
print(time.process_time() - began, *heavy)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 0.2 and out[1:] == []


def test_a_segment_that_lost_its_newlines_is_read_in_one_pass(tmp_path):
    """Twice the rows take about twice the time, not four times."""
    taken = []
    for rows in (2000, 8000):
        path = segment(tmp_path, [{"n": n, "text": "x" * 200} for n in range(rows)])
        path.write_bytes(path.read_bytes().replace(b"\n", b" "))
        began = time.process_time()
        assert [row.seq for row in read(tmp_path)] == list(range(1, rows))  # the first is part of the damage
        taken.append(time.process_time() - began)
    assert taken[1] < 8 * taken[0]
