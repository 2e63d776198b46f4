"""One fixed job for every engine: the same text on every machine."""

from importlib.util import find_spec
from pathlib import Path

import yaml

from shoestring.cluster import registry
from shoestring.cluster.job import make_job
from shoestring.cluster.load import load_cluster

RECIPE = """\
name: digits
model: {task: image-classification, config: {kind: mlp, hidden: [16]}}
data: {source: digits, batch_size: 64}
budget: {steps: 40}
"""

# what an engine's options must or may say; engines that are not named here do without
OPTIONS = {
    "kubernetes": {"volumes": [{"claim": "runs", "mount": "/runs"}], "queue": "team-a"},
    "skypilot": {"volume": "runs"},
    "ssh": {"hosts": ["n1", "n2", "n3"]},
}
EVERY_KUBERNETES_OPTION = {
    "namespace": "research", "context": "prod", "queue": "team-a", "runtime": "torch-distributed",
    "gpu": "nvidia.com/gpu", "cpu": "12", "memory": "200Gi", "shared_memory": "16Gi",
    "volumes": [{"claim": "runs", "mount": "/runs"}, {"claim": "data", "mount": "/data", "read_only": True}],
    "node_selector": {"pool": "gpu"}, "tolerations": [{"key": "spot", "operator": "Equal", "value": "yes",
    "effect": "NoSchedule"}, {}], "exclusive_topology": "topology.kubernetes.io/zone", "priority_class": "high",
    "service_account": "trainer", "image_pull_secrets": ["registry"], "grace_seconds": 300,
}  # fmt: skip


def engines():
    """The engines that are there."""
    homes = {name: home.partition(":")[0] for name, home in registry.ENGINES.items()}
    return [name for name, home in homes.items() if find_spec(f"shoestring.cluster.{home}")]


def cluster_values(engine, **more):
    """The values of a cluster file."""
    values = {
        "name": "lab", "engine": engine, "nodes": 2, "devices_per_node": 2, "hardware": "cpu",
        "price": {"usd_per_device_hour": 0.5}, "limits": {"hours": 4, "usd": 10},
        "environment": {"variables": {"GREETING": "it's $HOME, \"a,b\"\nand ü", "NCCL_IB_HCA": "mlx5"}},
        "secrets": {"TOKEN": {"env": "LAB_TOKEN"}},
    }  # fmt: skip
    if engine == "kubernetes":
        values["environment"]["container"] = {"image": "ghcr.io/team/train:1"}
    if engine in OPTIONS:
        values["options"] = OPTIONS[engine]
    return {**values, **more}


def a_cluster(folder: Path, engine, **more):
    path = folder / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(cluster_values(engine, **more)))
    return load_cluster(path)


def a_job(folder: Path, engine="local", *, cluster=None, **more):
    """A job with a fixed id, of two nodes (one, where the engine has no more)."""
    settings = {
        "name": "digits", "recipe": RECIPE, "run_dir": "/runs/digits", "workdir": "/work space",
        "nodes": 1 if engine == "local" else 2, "id": "digits-0a1b2c", "python": "/opt/py/bin/python", **more,
    }  # fmt: skip
    return make_job(cluster or a_cluster(folder, engine), **settings)
