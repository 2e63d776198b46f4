"""What Kubernetes and SkyPilot say of a job, in the words they say it, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import a_job

from shoestring.cluster import ClusterError, launch, registry
from shoestring.cluster.engine import JobRecord
from shoestring.cluster.engines import kubernetes, skypilot
from shoestring.cluster.engines.remote import there
from shoestring.cluster.node import attempts


def record(folder: Path, engine: str = "kubernetes") -> JobRecord:
    job = a_job(folder, engine, run_dir=str(folder / "digits"))
    Path(job.job_dir).mkdir(parents=True)
    return JobRecord(job.id, engine, "7", job.run_dir, job.job_dir, 1.0, job.facts())


def job_set(**conditions: str) -> dict[str, Any]:
    given = [{"type": kind, "status": "True", "message": said} for kind, said in conditions.items()]
    return {"kind": "JobSet", "status": {"conditions": [{"type": "StartupPolicy", "status": "False"}, *given]}}


def pod(index: int, phase: str, restart: int = 0, **state: Any) -> dict[str, Any]:
    annotations = {
        "batch.kubernetes.io/job-completion-index": str(index),
        "jobset.sigs.k8s.io/restart-attempt": str(restart),
    }
    status: dict[str, Any] = {"phase": phase}
    if state:
        status["containerStatuses"] = [{"name": "node", "state": state}]
    return {"metadata": {"annotations": annotations, "uid": f"u{index}"}, "spec": {"nodeName": f"n{index}"},
            "status": status}  # fmt: skip


RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


@pytest.mark.parametrize(
    ("resource", "pods", "state", "detail", "ended"),
    [
        (job_set(), [], "queued", "0 pods", None),
        (job_set(Suspended="jobset is suspended"), [], "queued", "suspended: jobset is suspended", None),
        (job_set(), [pod(0, "Running", **RUNNING), pod(1, "Pending", waiting={"reason": "ImagePullBackOff"})],
         "queued", "pod 1: ImagePullBackOff", None),
        (job_set(), [pod(0, "Running", **RUNNING), pod(1, "Running", **RUNNING)], "running", "2 pods", None),
        (job_set(Completed="jobset completed successfully"), [pod(0, "Succeeded")], "gone", "successfully", "finished"),
        (job_set(Complete="trainjob is done"), [], "gone", "done", "finished"),
        (job_set(Failed="jobset failed due to one or more job failures"), [], "gone", "job failures", "failed"),
        (None, [], "gone", "not in the cluster any more", None),
    ],
)  # fmt: skip
def test_kubernetes(tmp_path, resource, pods, state, detail, ended) -> None:
    status = kubernetes.status_from(record(tmp_path), resource, pods)
    assert (status.state, status.ended) == (state, ended) and detail in status.detail
    assert status.nodes == tuple(f"n{i}" for i in range(len(pods)))


def test_a_cancelled_job_is_known_to_be(tmp_path) -> None:
    job = record(tmp_path)
    Path(job.job_dir, "cancelled").touch()
    assert kubernetes.status_from(job, None, []).ended == "cancelled"


def test_what_pods_leave_behind_is_kept_here(tmp_path) -> None:
    """The cluster knows when an attempt began; node 0's last words tell the rest, over restarts, each row once."""
    job = record(tmp_path)
    job_dir = Path(job.job_dir)
    for _ in range(2):
        kubernetes.status_from(job, job_set(), [pod(0, "Running", **RUNNING)])
    [first] = attempts.history(job_dir)
    assert (first.number, first.started, first.ended) == (0, 1767225600.0, None)
    rows = [
        {"attempt": 0, "started": 1767225601.0, "nodes": ["n0", "n1"]},
        {"attempt": 0, "ended": 1767225661.0, "code": 85, "next": "requeue", "reason": "saved"},
        {"excluded": ["n1"]},
    ]
    message = "\n".join(map(json.dumps, rows)) + "\n"
    for _ in range(2):
        kubernetes.status_from(job, job_set(), [pod(0, "Failed", terminated={"exitCode": 85, "message": message})])
    [first] = attempts.history(job_dir)
    assert (first.seconds, first.next, first.nodes) == (60.0, "requeue", ("n0", "n1"))
    again = {"running": {"startedAt": "2026-01-01T00:05:00Z"}}
    kubernetes.status_from(job, job_set(), [pod(0, "Running", restart=1, **again)])
    assert [(a.number, a.started) for a in attempts.history(job_dir)] == [(0, 1767225601.0), (1, 1767225900.0)]
    (job_dir / "job.json").write_text(json.dumps({**job.facts, "record": {**job.__dict__, "facts": None}}))
    assert attempts.excluded(job_dir) == ["n1"]
    assert len((job_dir / "attempts.jsonl").read_text().splitlines()) == 4


def test_nodes_that_were_bad_are_left_out_of_the_next_job(tmp_path) -> None:
    earlier = record(tmp_path)
    own = {key: value for key, value in earlier.__dict__.items() if key != "facts"}
    Path(earlier.job_dir, "job.json").write_text(json.dumps({**earlier.facts, "record": own}))
    attempts.exclude(Path(earlier.job_dir), ["n1"])
    assert launch.excluded(earlier.run_dir) == ("n1",)
    job = a_job(tmp_path, "kubernetes", exclude=launch.excluded(earlier.run_dir))
    assert "- n1\n" in registry.engine("kubernetes").render(job)["jobset.yaml"]


@pytest.mark.parametrize(
    ("status", "state", "ended"),
    [
        ("RUNNING", "running", None),
        ("ManagedJobStatus.RUNNING", "running", None),
        ("PENDING", "queued", None),
        ("RECOVERING", "queued", None),
        ("SUCCEEDED", "gone", "finished"),
        ("CANCELLED", "gone", "cancelled"),
        ("FAILED_SETUP", "gone", "failed"),
    ],
)
def test_skypilot(status, state, ended) -> None:
    output = (
        f"A notice.\n{json.dumps([{'job_id': 17, 'status': 'RUNNING'}, {'job_id': 7, 'status': status}])}\nAnother."
    )
    seen = skypilot.status_from("7", output)
    assert (seen.state, seen.ended) == (state, ended)
    assert skypilot.status_from("8", output).state == "gone"


def test_skypilot_says_nothing_that_can_be_read() -> None:
    with pytest.raises(ClusterError, match="cannot read the output of sky jobs queue: Traceback"):
        skypilot.status_from("7", "Traceback")


def test_sky_is_not_here(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = registry.engine("skypilot")
    job = a_job(tmp_path, "skypilot")
    for call in (lambda: engine.submit(job, {}, {}), lambda: engine.query_status(record(tmp_path, "skypilot"))):
        with pytest.raises(ClusterError, match="sky is not installed here"):
            call()


def test_a_refused_launch_leaves_nothing(tmp_path, monkeypatch) -> None:
    """kubectl is not here, or has no cluster: one error, and neither files nor folders."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("LAB_TOKEN", "hush")
    job = a_job(tmp_path, "kubernetes", run_dir=str(tmp_path / "runs" / "digits"))
    for path in (None, ""):
        if path is not None:
            monkeypatch.setenv("PATH", path)
        with pytest.raises(ClusterError, match="kubectl") as caught:
            launch.submit(job)
        assert "hush" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["kubernetes.yaml"]


def test_where_nodes_keep_the_run(tmp_path) -> None:
    job = a_job(tmp_path, run_dir="/home/me/runs/digits")
    assert there(job, ["/runs", "/data"]).run_dir == "/runs/digits"
    assert there(job, ["/data", "/home/me"]).run_dir == "/home/me/runs/digits"
    assert there(job, ["/runs"]).job_dir == "/runs/digits/jobs/digits-0a1b2c"
