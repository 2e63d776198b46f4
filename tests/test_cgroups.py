"""What control groups leave to a process: files as the kernel lays them out, of both versions."""

import psutil
import pytest

from shoestring import cgroups

MB = 1 << 20


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Writes the process's line of /proc and files of its groups."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups.os, "sched_getaffinity", lambda process: set(range(64)))

    def write(own, **groups):
        (tmp_path / "own").write_text(own)
        for place, files in groups.items():
            folder = tmp_path / place.replace("__", "/")
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text)

    return write


def answers():
    return cgroups.usable_cpus(), cgroups.usable_memory() // MB, cgroups.available_memory() // MB


def test_version_2(kernel):
    kernel("0::/job\n", job={
        "cpu.max": "350000 100000\n", "memory.max": f"{80 * MB}\n", "memory.current": f"{50 * MB}\n",
        "memory.stat": f"anon 7\ninactive_file {20 * MB}\n",
    })  # fmt: skip
    assert answers() == (3, 80, 50)


def test_version_1(kernel):
    kernel(
        "5:cpu,cpuacct:/job\n3:memory:/job\n",
        cpu__job={"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"},
        memory__job={
            "memory.limit_in_bytes": f"{64 * MB}\n", "memory.usage_in_bytes": f"{60 * MB}\n",
            "memory.stat": f"total_inactive_file {10 * MB}\n",
        },
    )  # fmt: skip
    assert answers() == (2, 64, 14)


def test_the_job_around_a_task_limits_it_too(kernel):
    """As under Slurm: the task's own group has no limit."""
    kernel(
        "0::/slurm/job_7/step_0/task_0\n",
        slurm__job_7={"memory.max": f"{70 * MB}\n", "memory.current": f"{5 * MB}\n", "cpu.max": "max 100000\n"},
        slurm__job_7__step_0__task_0={"memory.max": "max\n", "memory.current": f"{MB}\n", "cpu.max": "100000 100000\n"},
    )  # fmt: skip
    assert answers() == (1, 70, 65)


def test_a_container_sees_its_group_as_the_root(kernel, tmp_path):
    kernel("0::/docker/4f3a\n")
    (tmp_path / "memory.max").write_text(f"{90 * MB}\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert answers() == (1, 90, 90)  # half a core is one, and who does not say what is used is taken at the limit


def test_without_limits_the_machine_decides(kernel):
    kernel("0::/\n")
    cpus, usable, available = answers()
    assert cpus == 64 and usable == psutil.virtual_memory().total // MB and 0 < available <= usable
