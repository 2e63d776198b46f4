"""Steps `contracts-*`: the project's own suite over techniques, on this device."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from checks import Checks, main

ROOT = Path(__file__).resolve().parents[2]


def contracts(checks: Checks, strategy: str) -> None:
    if importlib.util.find_spec("pytest") is None:
        checks.needs("the suite", "pytest")
        return
    env = {**os.environ, "SHOESTRING_TEST_CASES": "" if checks.cuda else "absent,gradual_pruning,weight_averaging"}
    chosen = [] if checks.cuda else ["trains_alike or test_resumes_bit or strength_zero"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "--tb=line"]
    command += ["-k", " and ".join([strategy, *(f"({part})" for part in chosen)]), "tests/contracts/test_ranks.py"]
    ended = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ended.stdout[-20000:], flush=True)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", ended.stdout)}
    failed = re.findall(r"^FAILED (\S+)", ended.stdout, re.MULTILINE)
    checks.figure(**counts, failures=failed[:20])
    checks.holds("the suite passes", ended.returncode == 0 and counts.get("passed", 0) > 0)
    if not checks.cuda:
        checks.needs("all techniques on a GPU")


if __name__ == "__main__":
    main({f"contracts-{strategy}": partial(contracts, strategy=strategy) for strategy in ("single", "zero2")})
