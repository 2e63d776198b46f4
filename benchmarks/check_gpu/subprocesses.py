"""One step in a process of its own, which is ended at its limit with all that it has started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL = 25  # lines of a failed step's output


@dataclass(frozen=True)
class Step:
    """name: what it is called. script: runs it, given `name`. limit: seconds at most, on a GPU. about: a few words."""

    name: str
    script: Path
    limit: float
    about: str


def run(step: Step, device: str, folder: Path, env: Mapping[str, str], limit: float) -> dict[str, Any]:
    """Run a step, for `limit` seconds at most.

    Returns:
        step, about, seconds, ok (True, False, or None where something could not be shown here), figures, checks, and of
        a failure the `error`: the last line that was said, or the limit.
    """
    began, error = time.monotonic(), None
    file, log = folder / f"{step.name}.json", folder / f"{step.name}.log"
    if limit <= 0:
        return _result(step, 0.0, {}, "not begun: no time was left")
    command = [sys.executable, str(step.script), step.name, "--device", device, "--file", str(file)]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=dict(env), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            if code:
                error = _last_line(log) or f"exit code {code}"
        except subprocess.TimeoutExpired:
            error = f"ended at its limit of {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # loader workers and ranks are of the same session
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if error is not None:  # what led to it, for whoever watches
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]), file=sys.stderr, flush=True)
    written = json.loads(file.read_text()) if file.exists() else {}
    return _result(step, time.monotonic() - began, written, error)


def _result(step: Step, seconds: float, written: Mapping[str, Any], error: str | None) -> dict[str, Any]:
    checks = written.get("checks", {})
    broken = [what for what, truth in checks.items() if truth is False]
    if error is None and broken:
        error = f"does not hold: {'; '.join(broken)}"
    if error is None and not checks:
        error = "nothing was checked"
    lacking = [what for what, truth in checks.items() if isinstance(truth, str)]
    return {
        "step": step.name, "about": step.about, "seconds": round(seconds, 1),
        "ok": False if error else None if lacking else True,
        "figures": written.get("figures", {}), "checks": checks, "error": error,
    }  # fmt: skip


def verdict(result: Mapping[str, Any]) -> str:
    """A result in words."""
    if result["ok"] is False:
        return f"FAILED: {result['error']}"
    shown = [what for what, truth in result["checks"].items() if truth is True]
    lacking = [f"{what} ({truth})" for what, truth in result["checks"].items() if isinstance(truth, str)]
    if not lacking:
        return f"ok: {'; '.join(shown)}"
    held = f"{len(shown)} of {len(shown) + len(lacking)} shown; " if shown else ""
    return f"{held}NOT SHOWN: {'; '.join(lacking)}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
