"""The pods of a job in Kubernetes: what a cluster file may ask of them, and their parts. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .. import environment
from ..config.sections import Count, Line, Section
from ..job import Job
from .remote import node_words, secret_names, train_words

FILES = "/etc/shoestring"  # where a pod finds recipe.yaml and job.json
NODE = "node"  # name of the replicated job, and of its container
LEAVE_SECONDS = 60  # after saving: the last records, the decision, the processes' own end
UNREACHABLE_SECONDS = 30  # Kubernetes itself waits 300 before it gives up the pods of a dead machine


class VolumeSpec(Section):
    """A PersistentVolumeClaim that all pods mount."""

    claim: Line = Field(description="the name of a PersistentVolumeClaim")
    mount: Annotated[str, Field(pattern=r"^/[^\x00-\x1f:]+$")] = Field(description="an absolute path in the pods")
    read_only: bool = Field(False, description="true | false")


class TolerationSpec(Section):
    """A taint that the pods may be placed on in spite of."""

    key: Line | None = Field(None, description="null (every taint), or the taint's key")
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = Field(None, description="null, or the taint's value")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubernetesOptions(Section):
    """Options of the pods of a job. A run is stored on the first volume that can be written."""

    kind: Literal["jobset", "trainjob"] = "jobset"
    volumes: Annotated[tuple[VolumeSpec, ...], Field(strict=False, min_length=1)] = Field(
        description="a list of mappings like {claim: runs, mount: /runs}; the first is where runs are kept"
    )
    namespace: Line = Field("default", description="a namespace")
    context: Line | None = Field(None, description="null (kubectl's own), or a context of kubectl")
    queue: Line | None = Field(None, description="null, or a Kueue queue")
    runtime: Line = Field("torch-distributed", description="a ClusterTrainingRuntime, for kind trainjob")
    gpu: Line = Field("nvidia.com/gpu", description="the resource name of a GPU")
    cpu: str | None = Field(None, pattern=r"^[0-9.]+m?$", description='null, or CPUs of a pod as text, like "12"')
    memory: str | None = Field(
        None, pattern=r"^[0-9.]+([KMGTP]i?)?$", description='null, or memory of a pod, like "200Gi"'
    )
    shared_memory: str | None = Field(
        None,
        pattern=r"^[0-9.]+([KMGTP]i?)?$",
        description='null (half of the memory), or a size of /dev/shm, like "16Gi"',
    )
    node_selector: dict[str, str] = Field(default={}, description="a mapping of node labels to text")
    tolerations: Annotated[tuple[TolerationSpec, ...], Field(strict=False)] = Field(
        (), description="a list of mappings like {key: spot, operator: Exists}"
    )
    exclusive_topology: Line | None = Field(
        None, description="null, or a node label whose value no two jobs may share, like a rack"
    )
    priority_class: Line | None = Field(None, description="null, or a PriorityClass; kind jobset only")
    service_account: Line | None = Field(None, description="null, or a service account")
    image_pull_secrets: Annotated[tuple[Line, ...], Field(strict=False)] = Field(
        (), description="a list of names of Secrets"
    )
    grace_seconds: Count | None = Field(
        None, description="null (what saving may take), or whole seconds that a pod gets to save"
    )


def options(job: Job) -> KubernetesOptions:
    chosen = job.cluster.options
    assert isinstance(chosen, KubernetesOptions)
    return chosen


def grace_seconds(job: Job) -> int:
    """Return how many seconds a pod may take to end."""
    return max(options(job).grace_seconds or 0, job.lead_seconds + LEAVE_SECONDS)


def image(job: Job) -> str:
    container = job.cluster.environment.container
    assert container is not None
    return container.image


def literal(text: str) -> str:
    """Text in which Kubernetes finds no `$(NAME)` to put something else for."""
    return text.replace("$", "$$")


def command(job: Job) -> list[str]:
    venv = job.cluster.environment.venv
    python = f"{venv.rstrip('/')}/bin/python" if venv and not job.cluster.environment.python else job.python
    place = [f"--master={job.id}-{NODE}-0-0.{job.id}", "--message=/dev/termination-log"]
    own, train = node_words(job, FILES), train_words(job, FILES)
    return [*map(literal, [python, *own]), "--node=$(JOB_COMPLETION_INDEX)", *map(literal, [*place, *train])]


def env(job: Job) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [
        {"name": name, "value": literal(value)} for name, value in environment.variables(job).items()
    ]
    entries.append({"name": "SHOESTRING_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}})
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    entries.append({"name": "JOB_COMPLETION_INDEX", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    for name in secret_names(job):
        entries.append({"name": name, "valueFrom": {"secretKeyRef": {"name": job.id, "key": name}}})
    return entries


def resources(job: Job) -> dict[str, Any]:
    chosen = options(job)
    amounts = {"cpu": chosen.cpu, "memory": chosen.memory, chosen.gpu: job.devices_per_node if job.on_gpus else None}
    # texts, as quantities are written
    given = {name: str(value) for name, value in amounts.items() if value is not None}
    return {"requests": given, "limits": given} if given else {}


def placement(job: Job) -> dict[str, Any]:
    chosen = options(job)
    fields: dict[str, Any] = {}
    if chosen.node_selector:
        fields["nodeSelector"] = dict(chosen.node_selector)
    if job.exclude:
        not_there = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(job.exclude)}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [not_there]}]}
        fields["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    fields["tolerations"] = [
        *({key: value for key, value in spec.model_dump().items() if value is not None} for spec in chosen.tolerations),
        *({
            "key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute",
            "tolerationSeconds": UNREACHABLE_SECONDS,
        } for state in ("unreachable", "not-ready")),
    ]  # fmt: skip
    if chosen.service_account:
        fields["serviceAccountName"] = chosen.service_account
    if chosen.image_pull_secrets:
        fields["imagePullSecrets"] = [{"name": name} for name in chosen.image_pull_secrets]
    return fields


def volumes(job: Job) -> list[dict[str, Any]]:
    chosen = options(job)
    memory: dict[str, Any] = {"medium": "Memory"}
    if chosen.shared_memory:
        memory["sizeLimit"] = chosen.shared_memory
    claims = dict.fromkeys(volume.claim for volume in chosen.volumes)
    return [
        {"name": "files", "configMap": {"name": job.id}},
        {"name": "shm", "emptyDir": memory},
        *({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": name}} for i, name in enumerate(claims)),
    ]


def mounts(job: Job) -> list[dict[str, Any]]:
    volumes = options(job).volumes
    claims = list(dict.fromkeys(volume.claim for volume in volumes))
    return [
        {"name": "files", "mountPath": FILES, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        *(
            {
                "name": f"claim-{claims.index(volume.claim)}",
                "mountPath": volume.mount,
                **({"readOnly": True} if volume.read_only else {}),
            }
            for volume in volumes
        ),
    ]
