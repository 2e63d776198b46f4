"""What the scripts of a Slurm job say; what they do is in test_slurm.py."""

import subprocess

import pytest
import yaml

from shoestring.cluster import ClusterError
from shoestring.cluster.engines.slurm import Slurm
from shoestring.cluster.job import make_job
from shoestring.cluster.load import load_cluster


@pytest.fixture
def rendered(tmp_path):
    """Both scripts of a job of 2 x 4 devices and two hours, in a shell's grammar; `keys` go into the cluster file."""

    def render(run_dir="/shared/runs/one", **keys):
        values = {"name": "lab", "engine": "slurm", "hardware": "h200", "nodes": 2, "devices_per_node": 4, **keys}
        (tmp_path / "lab.yaml").write_text(yaml.safe_dump(values))
        cluster = load_cluster(tmp_path / "lab.yaml")
        job = make_job(
            cluster,
            name="one",
            recipe="",
            run_dir=run_dir,
            workdir="/shared/code",
            hours=2,
            lead_seconds=90,
            id="one-1",
        )
        files = Slurm().render(job)
        for text in files.values():
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        return files

    return render


def header(files):
    return [line.removeprefix("#SBATCH --") for line in files["job.sh"].splitlines() if line.startswith("#SBATCH")]


def test_the_header_asks_for_what_the_job_is(rendered):
    assert header(rendered()) == [
        "job-name=one-1", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=2:00:00", "signal=B:USR1@90",
        "output=/shared/runs/one/jobs/one-1/output.log", "requeue", "open-mode=append",
    ]  # fmt: skip
    options = {
        "partition": "gpu,spot", "account": "team", "qos": "low", "constraint": "[a*2&b]", "cpus_per_task": 8,
        "memory_per_node": "64G", "gpus": "gres", "gpu_type": "h200", "extra": ["--exclusive", "--comment=x"],
    }  # fmt: skip
    lines = header(rendered(options=options, limits={"attempt_hours": "3601 s"}))
    assert {"gres=gpu:h200:4", "mem=64G", "cpus-per-task=8", "constraint=[a*2&b]", "time=1:01:00"} < set(lines)
    assert lines[-2:] == ["exclusive", "comment=x"]
    assert not any(
        "gpu" in line for line in header(rendered(hardware="cpu")) + header(rendered(options={"gpus": "none"}))
    )


def test_a_path_stands_in_the_header_as_it_is(rendered):
    assert 'output="/shared/my 100%% runs/jobs/one-1/output.log"' in header(rendered(run_dir="/shared/my 100% runs"))
    with pytest.raises(ClusterError, match="found a quote"):
        rendered(run_dir='/shared/"runs"')


@pytest.mark.parametrize(
    "options",
    [
        {"partition": "a\n#SBATCH --wrap=id"}, {"account": "a b"}, {"qos": "a#b"}, {"constraint": "'a'"},
        {"memory_per_node": "64 GB"}, {"extra": ["exclusive"]}, {"extra": ["--comment=a\nid"]},
        {"extra": ["--nodes=9"]}, {"extra": ["--time=9"]}, {"cpus_per_task": 0}, {"gpu": "gres"},
    ],
)  # fmt: skip
def test_no_option_brings_in_a_line_of_its_own(rendered, options):
    with pytest.raises(ClusterError, match=r"options\.\w+.*found"):
        rendered(options=options)


def test_tasks_run_in_the_container(rendered):
    def container(image, runtime="auto"):
        return rendered(environment={"container": {"image": image, "runtime": runtime}})["job.sh"]

    words = "apptainer exec --nv --bind /shared/runs/one --bind /shared/code --pwd /shared/code"
    assert f"IN_STEP=({words} /images/train.sif)" in container("/images/train.sif")
    assert f'  {words} /images/train.sif "$PYTHON" -m shoestring.cluster.node.attempts "$@"' in container(
        "/images/train.sif"
    )
    assert f"IN_STEP=({words} docker://ghcr.io/team/train:1)" in container("ghcr.io/team/train:1", "apptainer")
    mounts = "--container-mounts=/shared/runs/one:/shared/runs/one,/shared/code:/shared/code"
    words = f"'--container-image=ghcr.io#team/train:1' {mounts} --container-workdir=/shared/code"
    assert f"IN_STEP=({words})" in container("ghcr.io/team/train:1")
    assert f'  srun --overlap --nodes=1 --ntasks=1 {words} "$PYTHON"' in container("ghcr.io/team/train:1")
    with pytest.raises(ClusterError, match="no container can mount"):
        rendered(run_dir="/shared/a,b", environment={"container": {"image": "a.sif"}})
