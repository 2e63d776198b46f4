"""What Kubernetes is given: a JobSet or a TrainJob, a ConfigMap with the job's files, a Secret. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...exits import AGAIN
from ..config.document import ClusterError
from ..job import Job
from .pods import NODE, command, env, grace_seconds, image, mounts, options, placement, resources, volumes
from .remote import facts_file, secret_names, there

RESTART_RULE = "saved_or_evicted"
START_SECONDS = 1800  # until all pods are there; see node/rendezvous.py
KEPT_SECONDS = 7 * 86400  # how long a finished job can still be asked about


def manifests(job: Job) -> dict[str, dict[str, Any]]:
    """File name -> object; the first one is the job. The Secret is without its values."""
    chosen = options(job)
    if job.cluster.environment.container is None:
        raise ClusterError("Kubernetes runs images: set environment.container.image to one that has shoestring in it")
    if job.cluster.environment.modules:
        raise ClusterError("environment.modules: pods have no environment modules; install their software in the image")
    remote = there(job, [volume.mount for volume in chosen.volumes if not volume.read_only])
    made = {f"{chosen.kind}.yaml": train_job(remote) if chosen.kind == "trainjob" else job_set(remote)}
    made["configmap.yaml"] = _object("v1", "ConfigMap", job, data={
        "recipe.yaml": job.recipe, "job.json": facts_file(remote),
    })  # fmt: skip
    if names := secret_names(job):
        made["secret.yaml"] = secret(job, dict.fromkeys(names, ""))
    return made


def secret(job: Job, values: Mapping[str, str]) -> dict[str, Any]:
    return _object("v1", "Secret", job, type="Opaque", stringData=dict(values))


def _object(
    version: str,
    kind: str,
    job: Job,
    *,
    annotations: Mapping[str, str] | None = None,
    queue: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "shoestring", "app.kubernetes.io/instance": job.id}
    if queue:
        labels["kueue.x-k8s.io/queue-name"] = queue
    metadata: dict[str, Any] = {"name": job.id, "namespace": options(job).namespace, "labels": labels}
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}


def _topology(job: Job) -> dict[str, str]:
    chosen = options(job).exclusive_topology
    return {"alpha.jobset.sigs.k8s.io/exclusive-topology": chosen} if chosen else {}


def job_set(job: Job) -> dict[str, Any]:
    """A JobSet: one indexed Job, a pod a node, all of them made anew when one has saved or was evicted."""
    chosen = options(job)
    container = {
        "name": NODE,
        "image": image(job),
        "command": command(job),
        "env": env(job),
        "resources": resources(job),
        "volumeMounts": mounts(job),
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_seconds(job),
        **placement(job),
        **({"priorityClassName": chosen.priority_class} if chosen.priority_class else {}),
        "containers": [container],
        "volumes": volumes(job),
    }
    # a Job that fails by this policy is started again, any other failure is the JobSet's end (maxRestarts 0)
    policy = {"rules": [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": NODE, "operator": "In", "values": [AGAIN]}},
    ]}  # fmt: skip
    nodes = {
        "parallelism": job.nodes, "completions": job.nodes, "completionMode": "Indexed", "backoffLimit": 0,
        "activeDeadlineSeconds": _deadline(job), "podFailurePolicy": policy, "template": {"spec": pod},
    }  # fmt: skip
    return _object(
        "jobset.x-k8s.io/v1alpha2", "JobSet", job, annotations=_topology(job), queue=chosen.queue,
        spec={
            **({"suspend": True} if chosen.queue else {}),  # the queue lets it start
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": job.id},
            "successPolicy": {"operator": "All", "targetReplicatedJobs": [NODE]},
            "failurePolicy": {
                "maxRestarts": 0,
                "restartStrategy": "BlockingRecreate",
                "rules": [{
                    "name": RESTART_RULE, "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }],
            },
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": nodes}}],
        },
    )  # fmt: skip


def train_job(job: Job) -> dict[str, Any]:
    """A TrainJob: its failure policy, and so whether it is started again, is the runtime's."""
    chosen = options(job)
    if chosen.priority_class:
        raise ClusterError("options.priority_class: a TrainJob has no priority class of its own; set it in the runtime")
    patch = {
        "terminationGracePeriodSeconds": grace_seconds(job),
        **placement(job),
        "containers": [{"name": NODE, "volumeMounts": mounts(job)}],
        "volumes": volumes(job),
    }
    template: dict[str, Any] = {
        "spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": {"spec": patch}}}}]}
    }
    if _topology(job):
        template["metadata"] = {"annotations": _topology(job)}
    return _object(
        "trainer.kubeflow.org/v1alpha1", "TrainJob", job, queue=chosen.queue,
        spec={
            **({"suspend": True} if chosen.queue else {}),
            "activeDeadlineSeconds": _deadline(job),
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": chosen.runtime,
            },
            "trainer": {
                "image": image(job),
                "command": command(job),
                "numNodes": job.nodes,
                "numProcPerNode": job.devices_per_node,
                "resourcesPerNode": resources(job),
                "env": env(job),
            },
            "runtimePatches": [{
                "manager": "shoestring/launch", "trainingRuntimeSpec": {"template": template},
            }],
        },
    )  # fmt: skip


def _deadline(job: Job) -> int:
    """Behind the clock that an attempt keeps itself: for when that does not come to run."""
    return job.attempt_seconds + START_SECONDS + grace_seconds(job)
