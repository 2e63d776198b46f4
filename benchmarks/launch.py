"""How long `shoestring launch --dry-run` takes, for one node and for a thousand, on every engine.

    python benchmarks/launch.py [--rounds 7]

Whole processes, from the shell's call to the last line; the median over rounds, engines in turn so that a machine's
drift hits all alike. CPU time stands beside it, for machines that others use too.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from jobs import cluster_values, engines


def timed(folder: Path, engine: str, nodes: int) -> tuple[float, float]:
    """(wall-clock, CPU) seconds of one dry run."""
    values = cluster_values(engine, devices_per_node=8, hardware="h100", limits={"hours": 4}, secrets={})
    if engine == "ssh":
        values["options"] = {"hosts": [f"n{number}" for number in range(nodes)]}
    path = folder / f"{engine}-{nodes}.yaml"
    path.write_text(yaml.safe_dump(values))
    words = [sys.executable, "-m", "shoestring.trainer.cli", "launch", "digits", f"data.batch_size={nodes * 8}"]
    words += ["--cluster", str(path), "--nodes", str(nodes), "--dry-run"]
    # no engine is asked: what its own commands take is not ours
    env = {**os.environ, "SHOESTRING_HOME": str(folder / "home"), "PATH": ""}
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=folder, env=env, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - used.ru_utime + after.ru_stime - used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    cases = [(engine, nodes) for engine in engines() for nodes in ((1,) if engine == "local" else (1, 1000))]
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        timed(Path(folder), *cases[0])  # byte code is compiled once
        for _ in range(rounds):
            for case in cases:
                taken[case].append(timed(Path(folder), *case))
    print(f"shoestring launch --dry-run, median of {rounds}, seconds")
    for (engine, nodes), pairs in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"  {engine:<11}{nodes:>5} nodes   {wall:.2f} wall clock, {cpu:.2f} CPU")


if __name__ == "__main__":
    main()
