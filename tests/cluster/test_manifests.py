"""What Kubernetes would be given is what its published types allow, and nothing of it is lost on the way."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import yaml
from jobs import EVERY_KUBERNETES_OPTION, a_cluster, a_job, cluster_values
from kubeflow_trainer_api import models

from shoestring.cluster import ClusterError
from shoestring.cluster.engines.kubernetes import Kubernetes
from shoestring.cluster.engines.manifests import secret
from shoestring.cluster.engines.pods import literal

TYPES = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "ConfigMap": models.IoK8sApiCoreV1ConfigMap,
    "Secret": models.IoK8sApiCoreV1Secret,
}


def lost(given: Any, kept: Any, at: str = "") -> list[str]:
    """The places where `kept`, what the types know of `given`, is not the same."""
    if isinstance(given, dict) and isinstance(kept, dict):
        missing = [f"{at}.{key}" for key in given if key not in kept]
        return missing + [p for key in given if key in kept for p in lost(given[key], kept[key], f"{at}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [p for i, pair in enumerate(zip(given, kept, strict=True)) for p in lost(*pair, f"{at}[{i}]")]
    return [] if given == kept else [at]


def through_the_types(given: dict[str, Any]) -> list[str]:
    kept = json.loads(TYPES[given["kind"]].from_dict(copy.deepcopy(given)).to_json())
    return lost(given, kept)


def everything(tmp_path, kind: str, **job: Any) -> dict[str, dict[str, Any]]:
    """Every manifest with every option set, read back from its text."""
    options = {**EVERY_KUBERNETES_OPTION, "kind": kind}
    if kind == "trainjob":
        del options["priority_class"]
    cluster = a_cluster(tmp_path, "kubernetes", options=options, hardware="h100", devices_per_node=8)
    made = a_job(tmp_path, "kubernetes", cluster=cluster, exclude=("n7", "n8"), **job)
    return {name: yaml.safe_load(text) for name, text in Kubernetes().render(made).items()}


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_no_field_is_unknown_to_the_types(tmp_path, kind) -> None:
    made = everything(tmp_path, kind)
    assert list(made) == [f"{kind}.yaml", "configmap.yaml", "secret.yaml"]
    for manifest in made.values():
        assert through_the_types(manifest) == []
    text = yaml.safe_dump(made)
    for chosen in ("team-a", "200Gi", "16Gi", "/data", "pool", "spot", "registry", "n7", "research", "zone"):
        assert chosen in text, chosen


def test_a_wrong_field_is_reported(tmp_path) -> None:
    made = everything(tmp_path, "jobset")["jobset.yaml"]
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["terminationGracePeriod"] = 3
    assert through_the_types(made) == [".spec.replicatedJobs[0].template.spec.template.spec.terminationGracePeriod"]
    made = everything(tmp_path, "trainjob")["trainjob.yaml"]
    made["spec"]["podTemplateOverrides"] = []
    assert through_the_types(made) == [".spec.podTemplateOverrides"]
    made["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        through_the_types(made)


def test_the_protocol_is_in_the_job_set(tmp_path) -> None:
    cluster = a_cluster(tmp_path, "kubernetes", limits={"hours": 4, "attempt_hours": 1})
    job = a_job(tmp_path, "kubernetes", cluster=cluster, lead_seconds=90)
    made = yaml.safe_load(Kubernetes().render(job)["jobset.yaml"])
    [nodes] = made["spec"]["replicatedJobs"]
    spec, pod = nodes["template"]["spec"], nodes["template"]["spec"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"], spec["backoffLimit"]) == (
        2,
        2,
        "Indexed",
        0,
    )
    evicted, saved = spec["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    [container] = pod["containers"]
    assert saved["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [85]}
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 0 and policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > 90
    assert spec["activeDeadlineSeconds"] > job.attempt_seconds == 3600
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    master = next(word for word in container["command"] if word.startswith("--master="))
    assert master == f"--master={made['metadata']['name']}-{nodes['name']}-0-0.{made['spec']['network']['subdomain']}"
    assert "--node=$(JOB_COMPLETION_INDEX)" in container["command"]
    assert "JOB_COMPLETION_INDEX" in [entry["name"] for entry in container["env"]]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a" and made["spec"]["suspend"]


def test_the_files_of_a_job_are_its_nodes(tmp_path) -> None:
    """The recipe and the facts are in the ConfigMap, with the run's home as pods see it."""
    job = a_job(tmp_path, "kubernetes", run_dir="/home/me/runs/digits")
    files = yaml.safe_load(Kubernetes().render(job)["configmap.yaml"])["data"]
    assert files["recipe.yaml"] == job.recipe
    assert json.loads(files["job.json"]) == {**job.facts(), "run_dir": "/runs/digits"}
    below = a_job(tmp_path, "kubernetes", run_dir="/runs/team/digits")
    assert "/runs/team/digits" in Kubernetes().render(below)["jobset.yaml"]


def test_secrets_are_named_and_never_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LAB_TOKEN", "hush")
    job = a_job(tmp_path, "kubernetes")
    text = "".join(Kubernetes().render(job).values())
    assert "hush" not in text and "the environment variable LAB_TOKEN" in text
    entry = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": job.id, "key": "TOKEN"}}}
    made = yaml.safe_load(Kubernetes().render(job)["jobset.yaml"])
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert entry in pod["containers"][0]["env"]
    given = secret(job, {"TOKEN": "hush"})
    assert given["stringData"] == {"TOKEN": "hush"} and through_the_types(given) == []


def expanded(text: str, values: dict[str, str]) -> str:
    """What Kubernetes makes of a value: `$(NAME)` stands for a variable that is known, `$$` for a dollar."""
    known = lambda match: "$" if match[0] == "$$" else values.get(match[1], match[0])  # noqa: E731
    return re.sub(r"\$\$|\$\(([^)]*)\)", known, text)


@pytest.mark.parametrize("text", ["$(HOME)", "$$(HOME)", "a$", "$$", "$($HOME)", "${HOME} `ls`", "$(A$(HOME))"])
def test_values_are_not_expanded(text) -> None:
    values = {"HOME": "/root"}
    assert expanded(literal(text), values) == text
    assert expanded("$(HOME)", values) == "/root"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"environment": {}}, "set environment.container.image"),
        ({"environment": {"container": {"image": "a"}, "modules": ["cuda"]}}, "environment.modules"),
        ({"options": {**EVERY_KUBERNETES_OPTION, "kind": "trainjob"}}, "options.priority_class"),
    ],
)
def test_what_cannot_be_is_one_error(tmp_path, change, said) -> None:
    job = a_job(tmp_path, "kubernetes", cluster=a_cluster(tmp_path, "kubernetes", **change))
    with pytest.raises(ClusterError, match=re.escape(said)) as caught:
        Kubernetes().render(job)
    assert "\n" not in str(caught.value)


def test_a_volume_is_needed(tmp_path) -> None:
    with pytest.raises(ClusterError, match=r"options\.volumes: found nothing; allowed: a list of mappings"):
        a_cluster(tmp_path, "kubernetes", options={})
    assert "options" in cluster_values("kubernetes")
