"""Jobs on a real Slurm of three nodes: whatever interrupts a run, it ends with the weights of an undisturbed one."""

import json
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slurm_cluster import SCRIPT, SlurmCluster

from shoestring.cluster.job import LEAST_LEAD

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

SLOW = {"PAUSE": "0.5"}  # seconds a step, 30 in all
GRACE = 60  # seconds, of the partition `spot`


def odd_values() -> dict[str, str]:
    """What a shell, a comma separated list or a line-based file would change on the way."""
    values = [
        "a,b",
        'it\'s "so"',
        "$HOME `id` $(id) \\",
        "two\nlines\n",
        " blanks ",
        "",
        "-x=1",
        "größer ≥ 😀",
        "\r\x07",
    ]

    @settings(max_examples=40, database=None, derandomize=True)
    @given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
    def collect(text: str) -> None:
        values.append(text)

    collect()
    return {f"ODD_{number}": text for number, text in enumerate(values)}


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    subprocess.run([SCRIPT, "up"], check=True)
    yield SlurmCluster(tmp_path_factory.mktemp("slurm"))
    subprocess.run([SCRIPT, "down"], check=True)


@pytest.fixture(scope="session")
def undisturbed(slurm):
    """A run of the recipe from beginning to end."""
    job = slurm.launch("undisturbed", variables=odd_values())
    assert job["state"] in ("queued", "running") and job["on"] in ([], ["n1", "n2"])
    return slurm.ended(job["id"])


def test_two_nodes_of_two_ranks_train_to_the_end(slurm, undisturbed):
    assert undisturbed["state"] == "finished"
    (attempt,) = undisturbed["attempts"]
    assert (attempt["next"], attempt["code"], attempt["nodes"]) == ("finished", 0, ["n1", "n2"])
    assert slurm.saved_step(slurm.home("undisturbed")) == 60
    assert slurm.fact(undisturbed, "JobState") == "COMPLETED"
    log = slurm.log(undisturbed["id"])
    assert "60, stopped by steps" in log and "the run is finished" in log
    jobs = {job["id"]: job for job in json.loads(slurm.shoestring("jobs", "--json").stdout)}
    assert jobs[undisturbed["id"]]["state"] == "finished" and jobs[undisturbed["id"]]["usd"] > 0


def test_variables_arrive_as_they_were_written(slurm, undisturbed):
    folder = slurm.home("undisturbed") / "jobs" / undisturbed["id"]
    for rank in range(4):
        seen = json.loads((folder / f"environment-{rank}.json").read_text())
        assert {name: seen.get(name) for name in odd_values()} == odd_values()
        assert (seen["WORLD_SIZE"], seen["LOCAL_RANK"], seen["NODE_RANK"]) == ("4", str(rank % 2), str(rank // 2))


def test_at_the_time_limit_it_saves_and_goes_on(slurm, undisturbed):
    job = slurm.launch("limited", variables={"PAUSE": "2"})
    job = slurm.training(job["id"])
    minutes = int(job["seconds"] + LEAST_LEAD) // 60 + 1  # Slurm counts in these
    slurm.run("scontrol", "update", f"JobId={job['engine_id']}", f"TimeLimit={minutes}")
    job = slurm.ended(job["id"])
    first, *_, last = job["attempts"]
    assert (first["code"], first["next"], first["reason"]) == (85, "requeue", "its time was up")
    assert last["next"] == job["state"] == "finished"
    assert first["seconds"] < 60 * minutes
    assert slurm.weights("limited") == slurm.weights("undisturbed")
    log = slurm.log(job["id"])
    assert "attempt 0: its time was up (85); requeue" in log
    assert f"attempt {last['number']}: the run is finished" in log


def test_a_job_of_higher_priority_gets_the_nodes_at_once(slurm, undisturbed):
    # loader workers hear the signals that Slurm sends to every process of a step
    job = slurm.launch("preempted", "data.workers=1", variables=SLOW, options={"partition": "spot"})
    slurm.training(job["id"])
    started = time.monotonic()
    said = slurm.run("sbatch", "--parsable", "-pbatch", "-N3", "--exclusive", "-o/dev/null", "--wrap=true").stdout
    urgent = {"engine_id": said.strip()}
    while slurm.fact(urgent, "JobState") == "PENDING":
        time.sleep(0.5)
    waited = time.monotonic() - started
    print(f"the urgent job started after {waited:.1f} s")
    assert waited < GRACE / 2  # it saved and left, and was not killed when its grace ended
    job = slurm.ended(job["id"])
    first, last = job["attempts"]
    assert (first["code"], first["next"], first["reason"]) == (85, "requeue", "stopped on request; saved")
    assert last["next"] == job["state"] == "finished"
    assert slurm.weights("preempted") == slurm.weights("undisturbed")


def test_cancelled_it_saves_and_is_not_run_again(slurm):
    job = slurm.launch("cancelled", variables=SLOW, devices_per_node=1)
    slurm.training(job["id"])
    slurm.shoestring("cancel", job["id"])
    job = slurm.ended(job["id"])
    (attempt,) = job["attempts"]
    assert job["state"] == attempt["next"] == "cancelled" and attempt["code"] == 85
    assert job["detail"] == "the job was cancelled"
    saved = slurm.saved_step(slurm.home("cancelled"))
    assert 1 < saved < 60
    assert slurm.shoestring("cancel", job["id"], check=False).returncode == 2

    # the same run directory goes on from there, and Slurm's own command does the same
    other = slurm.launch("cancelled", again=True)
    slurm.training(other["id"], saved + 1)
    slurm.run("scancel", other["engine_id"])
    other = slurm.ended(other["id"])
    assert other["state"] == "cancelled" and other["attempts"][0]["code"] == 85
    time.sleep(2)  # Slurm's own states come last
    for each in (job, other):
        assert slurm.fact(each, "JobState") == "CANCELLED" and slurm.fact(each, "Restarts") == "0"


def test_cancelled_before_it_starts(slurm):
    job = slurm.launch("held", options={"extra": ["--hold"]})
    assert (job["state"], job["detail"]) == ("queued", "PENDING (JobHeldUser)")
    slurm.shoestring("cancel", job["id"])
    assert slurm.job(job["id"])["state"] == "cancelled"


def test_a_crash_is_reported_with_rank_host_and_traceback(slurm):
    job = slurm.launch("crashed", variables={"CRASH": "1"}, devices_per_node=1)
    log = slurm.log(job["id"], "-f")  # ends with the job
    job = slurm.job(job["id"])
    assert job["state"] == "failed" and job["detail"] == "rank 1 on n2: ArithmeticError: these numbers are odd"
    assert "[shoestring] rank 1 on n2 was the first to fail, with exit code 1:\nTraceback" in log
    assert "slow_training.py" in log and "ArithmeticError: these numbers are odd" in log
    assert slurm.fact(job, "JobState") == "FAILED"


def test_a_node_that_fails_its_checks_is_left_out(slurm):
    job = slurm.launch("checked", variables={"SHOESTRING_FAIL_PREFLIGHT": "n1"}, devices_per_node=1)
    job = slurm.ended(job["id"])
    first, last = job["attempts"]
    assert (first["code"], first["next"], first["nodes"]) == (86, "requeue", ["n1", "n2"])
    assert (last["next"], last["nodes"]) == ("finished", ["n2", "n3"])
    assert slurm.fact(job, "ExcNodeList") == "n1"


def test_a_lost_node_is_replaced(slurm, undisturbed):
    job = slurm.launch("lost", variables=SLOW)
    job = slurm.training(job["id"])
    _, second = job["on"]
    with slurm.unplugged(second):
        job = slurm.ended(job["id"])
    assert job["state"] == "finished" and second not in job["attempts"][-1]["nodes"]
    assert job["attempts"][0]["next"] in ("requeue", "lost")
    assert slurm.weights("lost") == slurm.weights("undisturbed")


def test_what_cannot_work_is_said_before(slurm):
    def remarks(name, *words, **cluster):
        file = slurm.cluster_file(name, **cluster)
        return slurm.shoestring(
            "launch", "recipe.yaml", *words, "--cluster", file, "--allow-code", "--dry-run", check=False
        ).stderr

    assert "Slurm expects to start it at" in remarks("fits")
    spot = remarks("spot", "seed=7", options={"partition": "spot"})  # how long this one saves is not known
    assert "partition spot kills 60 s after a preemption (GraceTime)" in spot and "KillWait" in spot
    short = remarks("short", "--hours", "3", options={"partition": "short"}, limits={})
    assert "Set limits.attempt_hours: 1" in short
    assert "Slurm does not accept this job" in remarks("many", nodes=4)
    gpus = remarks("gpus", hardware="h200", options={"gpu_type": "h200"})
    assert "Slurm does not accept this job" in gpus  # the nodes' GPUs have no type
    assert "Slurm expects to start it at" in remarks("gres", hardware="h200", options={"gpus": "gres"})
    injected = remarks("injected", options={"partition": "batch\n#SBATCH --wrap=id"})
    assert "options.partition: found" in injected and "one word" in injected
