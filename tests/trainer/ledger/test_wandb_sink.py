"""The W&B mirror with the real wandb: offline, without a server, with a dead one, and with a small one of our own.

Each case runs in a process of its own, as a run does: how a process ends is part of what is tested.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from shoestring.trainer.ledger import Journal, RunIdentity, write_summary

SUPPORT = Path(__file__).parents[2] / "support"
READER = runpy.run_path(str(SUPPORT / "wandb_reader.py"))
KEYS = {"loss", "tokens_per_second", "mfu", "usd", "kwh"}

# the training process: `rows` steps of a few milliseconds, then what `ending` says
RUN = """
import json, logging, os, signal, sys, time
from pathlib import Path
from shoestring.trainer.ledger import RunIdentity, WandbSink, replay
directory, mode, rows, ending = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
identity = RunIdentity.create_or_load(directory, name="a run", recipe={"seed": 7})
began, slowest = time.monotonic(), 0.0
if ending == "replay":
    sink = replay(directory, mode, "p", timeout=60)
else:
    sink = WandbSink(mode, "p", identity, identity.recipe, directory)
    for step in range(rows):
        row = {"loss": 2 / (step + 1), "tokens_per_second": 1e4, "mfu": 0.4, "usd": step / 7, "kwh": 1e-6 * step}
        before = time.perf_counter()
        sink.put(step, row)
        slowest = max(slowest, time.perf_counter() - before)
        time.sleep(0.002)
        if ending == "core" and step == rows // 2:
            while not sink.delivered: time.sleep(0.01)
            import psutil
            for child in psutil.Process().children(): child.kill()
    if ending in ("kill", "stop", "raise"):
        while sink.delivered < rows: time.sleep(0.01)
    if ending == "kill":
        time.sleep(2.0)
        import psutil  # the helper first: it would still write what it has when its parent is gone
        for child in psutil.Process().children(): child.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "stop":
        import psutil
        for child in psutil.Process().children(): child.suspend()
    if ending == "raise":
        raise KeyError("an error in the training")
    sink.summarize({"val_loss": 1.25})
    sink.finish(3.0 if ending == "stop" else 25.0)
print(json.dumps({"mode": sink.mode, "delivered": sink.delivered, "dropped": sink.dropped, "broken": sink.broken,
                  "slowest": slowest, "seconds": time.monotonic() - began, "torch": "torch" in sys.modules}))
"""


def start(directory, mode, rows, ending, **environment):
    # wandb leaves its helper's address in the environment of a process that has used it; these have their own
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = {**clean, "HOME": str(directory), "WANDB_API_KEY": "a" * 40, **environment}
    command = [sys.executable, "-c", RUN, str(directory), mode, str(rows), ending]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return json.loads(out), err  # so nothing else was printed


def history(directory):
    """The newest W&B file below `directory` and its rows."""
    path = sorted(directory.glob("wandb/*run-*/*.wandb"), key=os.path.getmtime)[-1]
    return path, READER["history"](path)


def assert_whole(history, rows):
    assert [row["step"] for row in history] == list(range(rows))
    assert all(row.keys() >= KEYS for row in history)
    assert history[3]["loss"] == 0.5 and history[2]["usd"] == 2 / 7 and history[5]["kwh"] == pytest.approx(5e-6)


@pytest.fixture(scope="module")
def servers():
    """One server that works, one that takes connections and never answers."""
    command = [sys.executable, SUPPORT / "wandb_server.py"]
    processes = [subprocess.Popen([*command, mode], stdout=subprocess.PIPE, text=True) for mode in ("ok", "hang")]
    yield [process.stdout.readline().strip() for process in processes]
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def runs(servers, tmp_path_factory):
    """All the runs at once, for most of their time is waiting."""
    working, silent = servers
    place = tmp_path_factory.mktemp
    cases = {
        "silent": (place("silent"), "online", 20, "finish", silent),
        "offline": (place("offline"), "offline", 400, "finish", working),
        "unreachable": (place("unreachable"), "online", 100, "finish", "http://127.0.0.1:9"),
        "killed": (place("killed"), "offline", 100, "kill", working),
        "raised": (place("raised"), "offline", 30, "raise", working),
        "core": (place("core"), "offline", 200, "core", working),
        "stop": (place("stop"), "offline", 20, "stop", working),
    }
    processes = {name: (case[0], start(*case[:4], WANDB_BASE_URL=case[4])) for name, case in cases.items()}
    yield processes
    for _, process in processes.values():
        if process.poll() is None:  # the helpers first: a stopped one would outlive its parent and keep the pipes open
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


def test_online_resume_and_replay(servers, tmp_path, runs):
    server = servers[0]
    first, err = finish(start(tmp_path, "online", 60, "finish", WANDB_BASE_URL=server))
    assert first["mode"] == "online" and first["delivered"] == 60 and err == ""
    identity = RunIdentity.load(tmp_path)
    run = state(server)[identity.id]
    assert_whole(run["rows"], 60)
    assert run["summary"]["val_loss"] == 1.25 and run["exit"] == 0 and "seed" in run["config"]

    # a second attempt starts again at step 0: W&B's own counter must not make it drop the rows
    finish(start(tmp_path, "online", 20, "finish", WANDB_BASE_URL=server))
    assert [row["step"] for row in state(server)[identity.id]["rows"]] == [*range(60), *range(20)]

    other = tmp_path / "other"
    replayed = RunIdentity.create_or_load(other, name="replayed")
    for attempt, steps in ((0, range(8)), (1, range(5, 12))):
        with Journal(other / "events", rank=0, attempt=attempt) as journal:
            for step in steps:
                journal.write("step", step=step, loss=float(attempt))
    write_summary(other, {"steps": 12})
    result, _ = finish(start(other, "online", 0, "replay", WANDB_BASE_URL=server))
    assert result["delivered"] == 12 and result["mode"] == "online"
    rows = state(server)[replayed.id]["rows"]
    assert [(row["step"], row["loss"]) for row in rows] == [(s, float(s >= 5)) for s in range(12)]


def state(server):
    with urllib.request.urlopen(f"{server}/state") as answer:
        return json.load(answer)["runs"]


def test_offline_file_holds_every_row(runs):
    directory, process = runs["offline"]
    result, err = finish(process)
    assert result["delivered"] == 400 and not result["dropped"] and not result["broken"] and not result["torch"]
    assert err == ""
    path, rows = history(directory)
    assert_whole(rows, 400)
    assert READER["summary"](path)["val_loss"] == 1.25
    run, config = READER["run"](path)
    assert (run.run_id, run.project, run.display_name) == (RunIdentity.load(directory).id, "p", "a run")
    assert config["seed"] == 7
    assert not list(directory.glob("wandb/*/files/*"))  # no console output, no code, no list of packages


def test_unreachable_server_means_offline_and_no_waiting(runs):
    directory, process = runs["unreachable"]
    result, err = finish(process)
    assert result["mode"] == "offline" and result["delivered"] == 100 and not result["broken"]
    assert result["slowest"] < 5 and result["seconds"] < 60, result
    assert err.count("\n") == 1 and "W&B cannot be used online" in err
    assert_whole(history(directory)[1], 100)


def test_silent_server_means_offline_within_the_init_timeout(runs):
    directory, process = runs["silent"]
    result, err = finish(process)
    assert result["mode"] == "offline" and result["delivered"] == 20 and result["seconds"] < 60, result
    assert err.count("\n") == 1 and "W&B cannot be used online" in err
    assert_whole(history(directory)[1], 20)


def test_rows_older_than_the_flush_survive_kill_9(runs):
    directory, process = runs["killed"]
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert_whole(history(directory)[1], 100)


def test_run_that_ends_by_an_error_keeps_its_rows(runs):
    directory, process = runs["raised"]
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "an error in the training" in err
    path, rows = history(directory)
    assert_whole(rows, 30)
    ends = [record.exit.exit_code for record in READER["records"](path) if record.WhichOneof("record_type") == "exit"]
    assert ends == [1]


@pytest.mark.parametrize("name", ["core", "stop"])
def test_dead_or_stuck_helper_is_given_up(runs, name):
    result, err = finish(runs[name][1])
    assert result["broken"], result
    # it neither blocks nor hangs, on a busy machine either
    assert result["slowest"] < 5 and result["seconds"] < 60, result
    assert result["delivered"] + result["dropped"] == (200 if name == "core" else 20)
    assert "turned off" in err and err.count("\n") == 1


def test_samples_are_a_table(tmp_path):
    code = """
import sys
from pathlib import Path
from shoestring.trainer.ledger import RunIdentity, WandbSink
directory = Path(sys.argv[1])
sink = WandbSink("offline", "p", RunIdentity.create_or_load(directory, name="a run"), {}, directory)
sink.table(3, "samples", [{"prompt": "Say one.", "text": "one!"}])
assert sink.finish(25.0)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60, cwd=tmp_path)
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text()) == {"columns": ["prompt", "text"], "data": [["Say one.", "one!"]]}
