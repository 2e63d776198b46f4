"""A job whose tasks cannot share the global batch is refused before it is submitted, with what would fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoestring.cluster import ClusterError
from shoestring.cluster.config.sections import Cluster
from shoestring.cluster.load import load_cluster
from shoestring.trainer.jobs.submit import job_for

BATCH, MICRO = "data.batch_size=96", "data.micro_batch_size=8"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "cluster.yaml"
    path.write_text("{name: here, engine: local, devices_per_node: 4, hardware: cpu, limits: {hours: 1}}")
    return load_cluster(path)


@pytest.mark.parametrize(
    ("nodes", "overrides", "said"),
    [
        (5, [BATCH], "found 96; allowed: a multiple of 20, for the job's 20 tasks (5 nodes x 4 devices); "
                     "2 | 3 | 4 | 6 nodes with 4 devices each would fit"),
        (2, [BATCH, MICRO], "found 96 in micro-batches of 8; allowed: a multiple of 64, for the job's 8 tasks "
                            "(2 nodes x 4 devices); 1 | 3 nodes with 4 devices each would fit"),
        (1, ["data.batch_size=3"], "found 3; allowed: a multiple of 4, for the job's 4 tasks (1 nodes x 4 devices); "
                                   "fewer than 4 devices would fit"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused_and_what_fits_is_named(
    nodes: int, overrides: list[str], said: str, cluster: Cluster
) -> None:
    with pytest.raises(ClusterError) as error:
        job_for("digits", overrides, cluster, nodes=nodes)
    assert str(error.value).endswith(f"data.batch_size: {said}")
    assert not Path("runs").exists()
    fits = re.search(r"; ([0-9 |]+) nodes with", str(error.value))
    for number in fits[1].split(" | ") if fits else ():
        assert job_for("digits", overrides, cluster, nodes=int(number)).nodes == int(number)


def test_the_thresholds_of_the_checks_travel_with_the_job(cluster: Cluster) -> None:
    preflight = job_for("digits", [BATCH], cluster).facts()["preflight"]
    assert preflight == cluster.preflight.model_dump(mode="json") and preflight["enabled"] is True
