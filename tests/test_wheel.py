"""What is installed is what is in the tree: the wheel, unpacked in a clean place, works outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, files):  # a copy, so that nothing is built into the tree
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        inside = set(archive.namelist())
    data = ("py.typed", "recipes/quickstart.yaml", "cluster/config/hardware.yaml")
    assert {f"shoestring/{name}" for name in data} <= inside
    packages = {str(Path(n).parent) for n in files if n.endswith(".py") and n.split("/")[0] in ROOMS}
    assert {f"shoestring/{p}/__init__.py" for p in packages} <= inside, "pyproject's list of packages is incomplete"
    left_out = tuple(f"shoestring/{folder}/" for folder in ("tests", "benchmarks", "docs", "examples"))
    assert not any(name.startswith(left_out) for name in inside)
    check = (
        "import shoestring, shoestring.recipes as r, sys\n"
        "from shoestring.callbacks.catalog.registry import TECHNIQUES\n"
        "assert 'site' in shoestring.__file__, shoestring.__file__\n"
        "r.load_recipe('quickstart'); assert len(TECHNIQUES) >= 8\n"
        "from shoestring.trainer import Trainer, Budget, Ledger, plan, fit; print(shoestring.__version__)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", check], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("\n")[-1][0].isdigit()


ROOMS = ("trainer", "callbacks", "recipes", "cluster")
