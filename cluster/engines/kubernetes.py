"""Kubernetes: a JobSet (or a TrainJob, where an administrator gives runtimes), driven by kubectl.

Pods see none of this machine's files: their files come in a ConfigMap, secrets in a Secret, and a run is kept on a
volume. Every pod runs `cluster/node/run.py`; exit code 85 and evictions restart the JobSet, everything else ends it.
After 86 (a node has failed its checks) the pods' template cannot be changed any more: launch the run again, and the new
job leaves that node out.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from ...yaml_writer import write_yaml
from ..config.document import ClusterError
from ..engine import EngineStatus, JobRecord, call
from ..job import Job, secret_sources
from ..node import attempts
from .background import streamed
from .manifests import manifests, secret
from .pods import NODE, KubernetesOptions, grace_seconds, options
from .remote import keep, secret_names, there, with_key

PATIENCE = "--request-timeout=20s"
POLL = 2.0  # seconds
SPOT_NOTICE = 30  # seconds that most clouds give before they take a spot machine


class Kubernetes:
    name = "kubernetes"
    Options = KubernetesOptions
    shares_filesystem = False

    def render(self, job: Job) -> dict[str, str]:
        files = {name: write_yaml(made) for name, made in manifests(job).items()}
        if "secret.yaml" in files:
            sources = secret_sources(job.cluster)
            said = "".join(f"# {name}: from {sources.get(name, 'this launch')}\n" for name in secret_names(job))
            files["secret.yaml"] = (
                f"# values are put in when it is submitted, and never written to a file\n{said}"
                + (files["secret.yaml"])
            )
        return files

    def remarks(self, job: Job) -> list[str]:
        chosen = options(job)
        home = there(job, [volume.mount for volume in chosen.volumes if not volume.read_only]).run_dir
        remarks = [f"the pods keep the run in {home}"]
        if job.cluster.price.kind == "spot" and grace_seconds(job) > SPOT_NOTICE:
            remarks.append(
                f"saving may take {job.lead_seconds} s, but spot machines are often taken away {SPOT_NOTICE} s after "
                "the notice: steps that are not saved by then are repeated from the last checkpoint"
            )
        if chosen.kind == "trainjob":
            remarks.append(f"the runtime {chosen.runtime} decides whether the job is started again after it has saved")
        if shutil.which("kubectl"):
            remarks += _cluster_remarks(chosen)
        return remarks

    def submit(self, job: Job, files: Mapping[str, str], secrets: Mapping[str, str]) -> str:
        chosen = options(job)
        kubectl = _kubectl(chosen.model_dump())
        first = next(iter(files))
        made = json.loads(call([*kubectl, "create", "-f", "-", "-o", "json"], stdin=files[first]))
        try:
            given = [yaml.safe_load(files["configmap.yaml"])]
            values = with_key(job, secrets)
            given += [secret(job, values)] if values else []
            owner = {key: made[key] for key in ("apiVersion", "kind")}
            owner |= {key: made["metadata"][key] for key in ("name", "uid")}
            for each in given:  # they go when the job goes
                each["metadata"]["ownerReferences"] = [owner]
            call(
                [*kubectl, "create", "-f", "-"], stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": given})
            )
        except BaseException:
            with suppress(ClusterError):
                call([*kubectl, "delete", chosen.kind, job.id, "--wait=false"])
            raise
        return f"{chosen.namespace}/{job.id}"

    def query_status(self, record: JobRecord) -> EngineStatus:
        return status_from(record, *_state(record))

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        kubectl = _kubectl(record.facts["options"])
        seen: set[str] = set()
        while True:
            resource, pods = _state(record)
            ready = {pod["metadata"]["uid"] for pod in pods if _phase(pod) in ("Running", "Succeeded", "Failed")}
            if pods and len(ready) == len(pods) and not ready & seen:
                seen |= ready
                command = [
                    *kubectl[:-1], "logs", "-l", _selector(record), "-c", NODE, "--prefix", "--tail=-1",
                    f"--max-log-requests={len(pods)}", *(["-f"] if follow else []),
                ]  # fmt: skip
                yield from streamed(command)
            if not follow or status_from(record, resource, pods).state == "gone":
                return
            time.sleep(POLL)

    def cancel(self, record: JobRecord) -> None:
        resource, pods = _state(record)
        if status_from(record, resource, pods).state == "gone":
            raise ClusterError(f"{record.id} is not running any more")
        job_dir = Path(record.job_dir)
        (job_dir / "cancelled").touch()
        for attempt in attempts.history(job_dir)[-1:]:
            if attempt.ended is None:
                attempts.note(
                    job_dir, attempt.number, ended=time.time(), next="cancelled", reason="the job was cancelled"
                )
        # pods get TERM and their grace period to save in; the object stays until they are gone
        kind = record.facts["options"]["kind"]
        call([*_kubectl(record.facts["options"]), "delete", kind, record.id, "--cascade=foreground", "--wait=false"])


def _kubectl(chosen: Mapping[str, Any]) -> list[str]:
    context = [f"--context={chosen['context']}"] if chosen["context"] else []
    return ["kubectl", *context, f"--namespace={chosen['namespace']}", PATIENCE]


def _cluster_remarks(chosen: KubernetesOptions) -> list[str]:
    """What the cluster says of a launch before there is one."""
    group = "trainjobs.trainer.kubeflow.org" if chosen.kind == "trainjob" else "jobsets.jobset.x-k8s.io"
    command = [*_kubectl(chosen.model_dump())[:-1], "--request-timeout=3s", "auth", "can-i", "create", group]
    try:
        call(command, timeout=5)
    except ClusterError as error:
        said = str(error).splitlines()[-1][-200:]
        if said.endswith("no"):
            return [f"the cluster does not allow to create {group} in namespace {chosen.namespace}"]
        return [f"the cluster does not answer: {said}"]
    return []


def _selector(record: JobRecord) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={record.id}"


def _phase(pod: Mapping[str, Any]) -> str:
    return str(pod.get("status", {}).get("phase", ""))


def _state(record: JobRecord) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The job's object as the cluster has it (None: it has none), and its pods in the order of nodes."""
    kubectl, kind = _kubectl(record.facts["options"]), record.facts["options"]["kind"]
    output = call([*kubectl, "get", kind, record.id, "--ignore-not-found", "-o", "json"])
    if not output.strip():
        return None, []
    pods = json.loads(call([*kubectl, "get", "pods", "-l", _selector(record), "-o", "json"]))["items"]
    return json.loads(output), sorted(pods, key=_index)


def _index(pod: Mapping[str, Any]) -> int:
    return int(pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", 0))


def status_from(record: JobRecord, resource: Mapping[str, Any] | None, pods: list[dict[str, Any]]) -> EngineStatus:
    """Read the state from the object and its pods; what the nodes wrote down of their attempts is kept on the way."""
    job_dir = Path(record.job_dir)
    ended: Literal["finished", "failed", "cancelled"] | None
    if resource is None:
        ended = "cancelled" if (job_dir / "cancelled").exists() else None
        return EngineStatus("gone", detail="not in the cluster any more", ended=ended)
    _keep_attempts(job_dir, pods)
    conditions = {c["type"]: c for c in resource.get("status", {}).get("conditions", []) if c.get("status") == "True"}
    nodes = tuple(str(pod["spec"]["nodeName"]) for pod in pods if pod.get("spec", {}).get("nodeName"))
    for condition, ended in (("Completed", "finished"), ("Complete", "finished"), ("Failed", "failed")):
        if condition in conditions:
            return EngineStatus(
                "gone", detail=str(conditions[condition].get("message", condition)), nodes=nodes, ended=ended
            )
    running = sum(_phase(pod) == "Running" for pod in pods)
    if pods and running == len(pods):
        return EngineStatus("running", detail=f"{running} pods", nodes=nodes)
    if "Suspended" in conditions:
        return EngineStatus(
            "queued", detail=f"suspended: {conditions['Suspended'].get('message', 'waiting for its queue')}"
        )
    return EngineStatus("queued", detail=_waiting(pods), nodes=nodes)


def _waiting(pods: list[dict[str, Any]]) -> str:
    """What the first pod that does not run waits for."""
    for pod in pods:
        status = pod.get("status", {})
        for container in status.get("containerStatuses", []):
            reason = container.get("state", {}).get("waiting", {}).get("reason")
            if reason:
                return f"pod {_index(pod)}: {reason}"
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return f"pod {_index(pod)}: {condition.get('message', 'not scheduled')}"
    return f"{len(pods)} pods, not all of them running"


def _keep_attempts(job_dir: Path, pods: list[dict[str, Any]]) -> None:
    """Node 0 leaves the record of attempts as its last words; of one that runs, the cluster knows the beginning."""
    for pod in pods[:1]:
        for container in pod.get("status", {}).get("containerStatuses", []):
            state = container.get("state", {})
            keep(job_dir, state.get("terminated", {}).get("message", ""))
            began = state.get("running", {}).get("startedAt")
            known = attempts.history(job_dir)
            if began and (not known or known[-1].ended is not None):
                restart = pod["metadata"].get("annotations", {}).get("jobset.sigs.k8s.io/restart-attempt", "0")
                started = datetime.fromisoformat(began).timestamp()
                if started > max((attempt.started for attempt in known), default=0.0) + 1:
                    number = max(int(restart), len(known))
                    keep(job_dir, json.dumps({"attempt": number, "started": started}))
