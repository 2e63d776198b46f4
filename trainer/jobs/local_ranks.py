"""The other ranks of a run on this machine, started as soon as the plan says how many there are.

Lightning starts them when a trainer fits: by then rank 0 has spent seconds on imports, and each of them spends as long
before the first step. Started beforehand, all import at once. They then wait until rank 0 has built the task: what it
found wrong it has said, once, and what it prepared (tokens, a tokenizer) they find ready.

    rank 0     plan, start ── import ── build the task ── release ── trainer.fit
    others        plan ────── import ── wait ──────────── build the task ── trainer.fit
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import Any

from ...exits import FINISHED, die_with_parent
from ..monitor.signals import launched_here, will_launch

# whoever sets these starts the ranks itself, or Lightning asks it how
LAUNCHERS = (
    "LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SHOESTRING_JOB_DIR", "SLURM_NTASKS", "LSB_JOBID",
    "OMPI_COMM_WORLD_RANK", "PMI_RANK", "KUBERNETES_SERVICE_HOST",
)  # fmt: skip
_WAITS = "SHOESTRING_WAITS_FOR_RANK_0"
_started: list[subprocess.Popen[bytes]] = []


def start(devices: int, nodes: int) -> None:
    """Run this process's command again for ranks 1 to `devices` - 1; nothing where somebody else starts ranks."""
    if _WAITS in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0 as long as this one waits
    if devices < 2 or nodes > 1 or any(name in os.environ for name in LAUNCHERS):
        return
    will_launch()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "NODE_RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(devices),
    }
    for rank in range(1, devices):
        env = {**os.environ, "LOCAL_RANK": str(rank), _WAITS: "1"}
        _started.append(subprocess.Popen(_command(), env=env, stdin=subprocess.PIPE))


def wait() -> None:
    """In a rank that `start` has started: until rank 0 releases it. It ends here where rank 0 has ended."""
    if os.environ.pop(_WAITS, None) and launched_here():
        die_with_parent()
        if not os.read(0, 1):
            raise SystemExit(FINISHED)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def release() -> None:
    """Let the ranks that `start` has started go on, and end this process when one of them fails."""
    from lightning_fabric.strategies.launchers.subprocess_script import _launch_process_observer

    for process in _started:
        assert process.stdin is not None
        try:
            process.stdin.write(b"1")
            process.stdin.flush()
        except BrokenPipeError:  # it has failed: the observer sees that
            pass
    if _started:
        _launch_process_observer(_started)


def hand_over(trainer: Any) -> None:
    """Tell Lightning of them: it kills them on a second Ctrl-C."""
    if _started:
        trainer.strategy.launcher.procs = list(_started)


def _command() -> list[str]:
    import __main__

    if __main__.__spec__ is None:
        return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
    return [sys.executable, "-m", __main__.__spec__.name, *sys.argv[1:]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
