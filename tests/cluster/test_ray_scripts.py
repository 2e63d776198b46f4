"""What a job on Ray is given, without Ray."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from shoestring.cluster import ClusterError, launch
from shoestring.cluster.job import Job, make_job
from shoestring.cluster.load import load_cluster

FILE = """
name: lab
engine: ray
devices_per_node: 8
hardware: H200
limits: {hours: 2 h}
environment: {variables: {A: "it's $HOME, \\"b\\""}}
secrets: {TOKEN: {env: TOKEN}}
options: {cpus_per_task: 4, resources: {rack: 0.5}, labels: {ray.io/accelerator-type: H200}}
"""


def job(folder: Path, text: str = FILE) -> Job:
    (folder / "lab.yaml").write_text(text)
    cluster = load_cluster(folder / "lab.yaml")
    run_dir = str(folder / "it's a $run")
    return make_job(cluster, name="r", recipe="model: {}\n", run_dir=run_dir, workdir=str(folder), nodes=2, id="r-1")


def test_scripts_are_bash_whatever_the_names(tmp_path: Path) -> None:
    made = launch.rendered(job(tmp_path))
    assert list(made) == ["job.sh", "node.sh", "recipe.yaml", "env.sh"]
    for name in ("job.sh", "node.sh", "env.sh"):
        subprocess.run(["bash", "-n"], input=made[name], text=True, check=True)
    assert "--nnodes=2" in made["node.sh"] and "--nproc-per-node=8" in made["node.sh"]


def test_what_a_node_must_have(tmp_path: Path) -> None:
    from shoestring.cluster.engines.ray_driver import bundle

    assert bundle(job(tmp_path).facts()) == {"CPU": 32, "GPU": 8, "rack": 0.5}
    assert bundle(job(tmp_path, FILE.replace("H200", "cpu")).facts()) == {"CPU": 32, "rack": 0.5}


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(
        ClusterError, match=r"lab\.yaml:9: options\.address: found head:8265; allowed: null .*http://head"
    ):
        job(tmp_path, FILE.replace("{cpus_per_task", "{address: 'head:8265', cpus_per_task"))
    with pytest.raises(ClusterError, match=r"did you mean cpus_per_task\?"):
        job(tmp_path, FILE.replace("cpus_per_task", "cpu_per_task"))


def test_nodes_have_their_own_image(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"found team/train:1; allowed with engine ray: null"):
        launch.rendered(
            job(tmp_path, FILE.replace("environment: {", "environment: {container: {image: 'team/train:1'}, "))
        )
