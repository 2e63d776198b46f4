"""From figures by seed to a page: intervals, verdicts, tables, where and when it was measured; shared by the scripts.

A verdict on "a above b" looks at the differences seed by seed. Where their 95 % interval (Student's t) holds 0, it says
so and nothing else; otherwise the ordering appears, or does NOT.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WIDTH = 120
FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
HOLDS_0 = "interval holds 0"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t). At least two values."""
    from scipy.stats import t as student

    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def shown(values: Sequence[float], sign: bool = False, digits: int = 2) -> str:
    """`97.12 ± 0.45`, with a + in front where `sign` asks for it."""
    mean, half = interval(values)
    return f"{mean:{'+' if sign else ''}.{digits}f} ± {half:.{digits}f}"


def paired(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Differences seed by seed."""
    return [a - b for a, b in zip(these, those, strict=True)]


def verdict(gaps: Sequence[float], at_least: float = 0.0) -> str:
    """Whether "above, by at least so much" appears, given the differences by seed."""
    mean, half = interval(gaps)
    if abs(mean) <= half:
        return HOLDS_0
    if mean < max(at_least, 0.0):
        return f"does NOT appear (above, by less than {at_least:g})" if mean > 0 else "does NOT appear"
    below = mean - half < at_least
    return f"appears in the mean, the interval reaches below {at_least:g}" if below else "appears"


def about_equal(gaps: Sequence[float], within: float) -> str:
    """Whether "equal, give or take `within`" appears: the mean, and the interval too."""
    mean, half = interval(gaps)
    if abs(mean) > within:
        return "does NOT appear"
    beyond = abs(mean) + half > within
    return f"appears in the mean, the interval reaches beyond {within:g}" if beyond else "appears"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def wrapped(text: str) -> str:
    """Every paragraph filled to one width, however it was broken before."""
    return "\n\n".join(textwrap.fill(" ".join(part.split()), WIDTH) for part in text.split("\n\n"))


def measured(script: str, threads: int = 1) -> str:
    """Date, machine and versions of what runs now, and the command that does."""
    import torch

    from shoestring.trainer.machine.facts import cpu_flags, cpu_model

    features = [flag for flag in FEATURES if flag in cpu_flags()]
    return wrapped(
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores {cpu_model()} ({', '.join(features) or 'no AVX2'}), CPU "
        f"only, {threads} thread; torch {torch.__version__}, Python "
        f"{platform.python_version()}. Made by `python benchmarks/{script}`."
    )


def page(title: str, *parts: str | Sequence[str]) -> str:
    """A page of paragraphs (str) and tables (lines)."""
    return "\n\n".join([f"# {title}", *(part if isinstance(part, str) else "\n".join(part) for part in parts), ""])[:-1]


def take_turns(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of process CPU time of a call, variants in turns A B C … A B C …, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(2 + rounds):
        for name, call in variants.items():
            began = time.process_time()
            call()
            if turn >= 2:
                times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(each) for name, each in times.items()}


def in_processes(script: str, count: int, *arguments: str) -> list[dict[str, Any]]:
    """What a benchmark writes with `--json FILE`, from `count` processes, one after another."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        for _ in range(count):
            subprocess.run([sys.executable, script, *arguments, "--json", str(path)], check=True)
            results.append(json.loads(path.read_text()))
    return results


def arguments(about: str, *, seeds: int | None = None, recorded: bool = False) -> argparse.ArgumentParser:
    """What most benchmarks are told on the command line.

    seeds: the default of --seeds. recorded: --record too, for `Runs`.
    """
    parser = argparse.ArgumentParser(description=about)
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds)
    if recorded:
        parser.add_argument("--record", type=Path, help="runs made before are taken from here, new ones added")
    parser.add_argument("--write", action="store_true", help="put the page into benchmarks/results")
    return parser


def publish(text: str, script: str, write: bool) -> None:
    """Print a page, and put it where the pages are if `write`. script: `__file__` of the benchmark it belongs to."""
    print(text)
    if write:
        (RESULTS / f"{Path(script).stem}.md").write_text(text)


def quiet() -> None:
    """One thread, no warnings, no log lines of Lightning."""
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


class Runs:
    """Figures by name of the run, kept in a file of JSON lines where one is given: a stopped benchmark goes on there.

    Several processes may add to one file. It belongs to one version of the script: a changed one needs a new file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._known: dict[str, Any] = dict(json.loads(line) for line in lines)

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, or returned when this run was made before."""
        if name not in self._known:
            self._known[name] = make()
            print(f"{name}: {self._known[name]}", flush=True)
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps([name, self._known[name]]) + "\n")
        return self._known[name]
