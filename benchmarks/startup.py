"""What starting costs: a page of help, a plan of every shipped recipe, and quickstart up to its first step.

    python benchmarks/startup.py [--before COMMIT] [--rounds 5] [--write]

Whole processes, versions in turns so that a machine's drift hits all alike. CPU time and function calls stand beside
the wall clock, for machines that others use too; calls are counted once, by Python's own profiler. Cold is an empty
SHOESTRING_HOME: no tokens, no trained tokenizer, no measured peak; warm is the run after it. A run's CPU time is that
of all its ranks. --write makes results/startup.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from report import arguments, measured, page, publish, table, wrapped

ROOT = Path(__file__).resolve().parents[1]
BUDGET_SECONDS = 120  # quickstart's
COUNT = """
import cProfile, io, pstats, sys
sys.argv = ["shoestring", *sys.argv[1:]]
profile = cProfile.Profile()
profile.enable()
from shoestring.trainer.cli import main
try:
    main()
except SystemExit:
    pass
profile.disable()
print(pstats.Stats(profile, stream=io.StringIO()).total_calls, file=sys.stderr)
"""


class Version:
    """One state of the repository, run from its own folder."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        (folder / "package").mkdir(parents=True)
        (folder / "package" / "shoestring").symlink_to(source)
        kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.env = {**kept, "PYTHONPATH": str(folder / "package"), "SHOESTRING_HOME": str(folder / "home")}
        self.turn = 0

    def command(self, *words: str) -> tuple[float, float]:
        """(CPU, wall-clock) seconds of `shoestring *words`."""
        before, began = os.times(), time.perf_counter()
        subprocess.run(self._line(*words), env=self.env, cwd=self.folder, check=True, capture_output=True)
        wall, after = time.perf_counter() - began, os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system, wall

    def calls(self, *words: str) -> int:
        """Function calls of `shoestring *words`."""
        line = [sys.executable, "-c", COUNT, *words]
        done = subprocess.run(line, env=self.env, cwd=self.folder, check=True, capture_output=True, text=True)
        return int(done.stderr.split()[-1])

    def first_step(self, *, cold: bool) -> tuple[float, float]:
        """(CPU, wall-clock) seconds from the call of `train quickstart` until its first step begins."""
        self.turn += 1
        run = self.folder / f"run{self.turn}"
        env = {**self.env, "SHOESTRING_HOME": str(self.folder / f"home{self.turn}")} if cold else self.env
        changes = ["budget={steps: 1}", "evaluation={at_end: false}", "export=null"]
        line = self._line("train", "quickstart", *changes, "--run-dir", str(run))
        began, cpu = time.time(), 0.0
        process = psutil.Popen(line, env=env, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (started := _start(run)) is None:
            cpu = max(cpu, _cpu(process))
            time.sleep(0.02)
        process.wait()
        started = _start(run)
        assert started is not None, f"{line} has not begun a step"
        return cpu, started - began

    def _line(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "shoestring.trainer.cli", *words]


def _start(run: Path) -> float | None:
    """When the run's first step began, by its journal."""
    for path in run.glob("events/*r00000.jsonl"):
        for line in path.read_text().splitlines():
            if '"event":"start"' in line:
                return float(json.loads(line)["t"])
    return None


def _cpu(process: psutil.Process) -> float:
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            used = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


@contextmanager
def versions(before: str | None) -> Iterator[dict[str, Version]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = {}
        if before:
            tree = folder / "tree"
            subprocess.run(
                ["git", "worktree", "add", "--detach", str(tree), before], cwd=ROOT, check=True, capture_output=True
            )
            states["before"] = Version(tree, folder / "before")
        states["now"] = Version(ROOT, folder / "now")
        try:
            yield states
        finally:
            if before:
                subprocess.run(["git", "worktree", "remove", "--force", str(folder / "tree")], cwd=ROOT, check=True)


def in_turns(states: dict[str, Version], rounds: int, run: Callable[[Version], tuple[float, float]]) -> dict[str, Any]:
    """Median (CPU, wall-clock) seconds by version."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in states}
    for _ in range(rounds):
        for name, version in states.items():
            taken[name].append(run(version))
    return {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in taken.items()}


def written(before: str | None, rounds: int, names: list[str], rows: list[list[str]], starts: list[list[str]]) -> str:
    """The page."""

    def columns(*kinds: str) -> list[str]:
        return [f"{kind}, {name}" if len(names) > 1 else kind for kind in kinds for name in names]

    said = f"Before is commit {before}. " if before else ""
    return page(
        "What starting costs",
        measured(f"startup.py{f' --before {before}' if before else ''} --write", os.cpu_count() or 1),
        wrapped(f"{said}Medians of {rounds} whole processes, versions in turns; calls are Python function calls, "
                "counted once by the profiler."),
        "## Commands", table(["shoestring", *columns("CPU s", "wall s", "calls")], rows),
        "## From `train quickstart` to its first step",
        wrapped(f"The share is that of the recipe's budget of {BUDGET_SECONDS} s, by the wall clock. Cold is an empty "
                "SHOESTRING_HOME: the tokenizer is trained and the data tokenized. CPU seconds are those of both "
                "ranks."),
        table(["cache", *columns("CPU s", "wall s", "share")], starts),
    )  # fmt: skip


def main() -> None:
    from shoestring.recipes import shipped_recipes

    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="COMMIT", help="Compare with this state.")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    commands = [["--help"], *(["plan", name] for name in shipped_recipes())]
    rows, starts = [], []
    with versions(given.before) as states:
        for version in states.values():
            version.command("plan", "quickstart")  # byte code is compiled once, and peaks are measured
            version.first_step(cold=False)
        for words in commands:
            seconds = in_turns(states, given.rounds, lambda version, words=words: version.command(*words))
            calls = {name: version.calls(*words) for name, version in states.items()}
            rows.append([" ".join(words), *(f"{seconds[name][0]:.2f}" for name in states),
                         *(f"{seconds[name][1]:.2f}" for name in states),
                         *(f"{calls[name]:,}" for name in states)])  # fmt: skip
            print(rows[-1], flush=True)
        for cold in (True, False):
            seconds = in_turns(states, given.rounds, lambda version, cold=cold: version.first_step(cold=cold))
            starts.append(["cold" if cold else "warm", *(f"{seconds[name][0]:.1f}" for name in states),
                           *(f"{seconds[name][1]:.1f}" for name in states),
                           *(f"{seconds[name][1] / BUDGET_SECONDS:.1%}" for name in states)])  # fmt: skip
            print(starts[-1], flush=True)
    text = written(given.before, given.rounds, list(states), rows, starts)
    publish(text, __file__, given.write)


if __name__ == "__main__":
    main()
