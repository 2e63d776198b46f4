"""What would be submitted, whole, for every engine: with no engine at hand, without torch, and touching nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobs import a_job, cluster_values, engines

from shoestring.cluster.launch import dry_run

GOLDEN = Path(__file__).parents[1] / "golden" / "jobs"
# the command line in a process of its own, which then says whether torch came along
COMMAND = """
import sys
from shoestring.trainer.cli import main
sys.argv = ["shoestring", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "pytorch_lightning", "transformers", "numpy", "ray", "kubernetes", "sky"} & set(sys.modules)
    print("HEAVY", sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize("engine", engines())
def test_the_whole_of_it(engine, tmp_path) -> None:
    """Rewritten with SHOESTRING_GOLDEN=write; look at the difference before it is kept."""
    text = dry_run(a_job(tmp_path, engine))
    golden = GOLDEN / f"{engine}.txt"
    if os.environ.get("SHOESTRING_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_no_golden_is_of_an_engine_that_is_gone() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(engines())


@pytest.mark.parametrize("engine", engines())
def test_it_is_pure(engine, tmp_path) -> None:
    job = a_job(tmp_path, engine)
    assert dry_run(job) == dry_run(job)
    assert [path.name for path in tmp_path.iterdir()] == [f"{engine}.yaml"]


@pytest.mark.parametrize("engine", engines())
def test_bash_can_read_every_script(engine, tmp_path) -> None:
    from shoestring.cluster.launch import rendered

    bash = shutil.which("bash")
    assert bash
    files = rendered(a_job(tmp_path, engine))
    scripts = {name: text for name, text in files.items() if name.endswith(".sh")}
    if engine == "skypilot":
        scripts["run"] = yaml.safe_load(files["task.yaml"])["run"]
    for name, text in scripts.items():
        done = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), name


def launch(folder: Path, engine: str, nodes: int, **more) -> subprocess.CompletedProcess[str]:
    """`shoestring launch --dry-run` where neither engines nor a home are."""
    settings = {"devices_per_node": 8, "hardware": "h100", "limits": {"hours": 4}, "secrets": {}, **more}
    values = cluster_values(engine, **settings)
    if engine == "ssh":
        values["options"] = {"hosts": [f"n{number}" for number in range(nodes)]}
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    words = [
        "launch",
        "digits",
        f"data.batch_size={nodes * 8}",
        "--cluster",
        "c.yaml",
        "--nodes",
        str(nodes),
        "--dry-run",
    ]
    empty = folder / "empty"
    empty.mkdir()
    env = {**os.environ, "PATH": str(empty), "SHOESTRING_HOME": str(folder / "home"), "HOME": str(folder / "user")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMAND, *words], cwd=folder, env=env, capture_output=True, text=True
    )


def test_a_refusal_is_as_light(tmp_path) -> None:
    done = launch(tmp_path, "kubernetes", 1000, limits={"hours": 4, "usd": 10})
    assert done.returncode == 2 and "too expensive for lab" in done.stderr and "HEAVY []" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "empty"]


@pytest.mark.parametrize("engine", engines())
def test_the_command_line_for_many_nodes(engine, tmp_path) -> None:
    nodes = 1 if engine == "local" else 1000
    done = launch(tmp_path, engine, nodes)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr
    assert f"{nodes} nodes x 8 devices x 4 h x $0.5 a device-hour = ${nodes * 16:.2f} at most" in done.stderr
    assert "shoestring.trainer.cli" in done.stdout and "batch_size" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "empty"]
