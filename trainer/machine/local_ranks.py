"""The other ranks of a run on this machine, started as soon as the plan says how many there are.

Lightning starts them when a trainer fits: by then rank 0 has spent seconds on imports, and each of them spends as long
before the first step. Started beforehand, all import at once. They then wait until rank 0 has built the task: what it
found wrong it has said, once, and what it prepared (tokens, a tokenizer) they find ready.

    rank 0     plan, start ── import ── build the task ── release ── trainer.fit
    others        plan ────── import ── wait ──────────── build the task ── trainer.fit
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from time import sleep
from typing import Any

from ...exits import FINISHED, with_parent
from .signals import ASKS_TO_STOP, launched_here, started_here, will_launch

# whoever sets these starts the ranks itself, or Lightning asks it how
LAUNCHERS = (
    "LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SHOESTRING_JOB_DIR", "LSB_JOBID",
    "OMPI_COMM_WORLD_RANK", "PMI_RANK", "KUBERNETES_SERVICE_HOST",
)  # fmt: skip
log = logging.getLogger("shoestring")

_WAITS = "SHOESTRING_WAITS_FOR_RANK_0"
LEAVING = 10.0  # seconds that rank 0 has for ending by itself when another rank has failed
_started: list[subprocess.Popen[bytes]] = []


def start(devices: int, nodes: int) -> None:
    """Run this process's command again for ranks 1 to `devices` - 1; nothing where somebody else starts ranks."""
    if devices < 2 or nodes > 1 or _tasks_of_srun() > 1 or any(name in os.environ for name in LAUNCHERS):
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
        _started.append(subprocess.Popen(with_parent(_command()), env=env, stdin=subprocess.PIPE))
    threading.Thread(target=_watch, name="shoestring-ranks", daemon=True).start()


def wait() -> None:
    """In a rank that `start` has started: until rank 0 releases it. It ends here where rank 0 has ended."""
    if os.environ.pop(_WAITS, None) and launched_here() and not os.read(0, 1):
        raise SystemExit(FINISHED)


def release() -> None:
    """Let the ranks that `start` has started go on."""
    for process in _started:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has failed: `_watch` sees that
            process.stdin.write(b"1")
            process.stdin.flush()


def _watch() -> None:
    """End this process when one of the ranks it has started has failed, unless it ends by itself."""
    while True:
        sleep(0.2)
        failed = [code for process in _started if (code := process.poll())]
        if any(-code in ASKS_TO_STOP for code in failed):  # before it could hear the signal
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if failed:
            sleep(LEAVING)
            os.kill(os.getpid(), signal.SIGKILL)  # it waits for the lost one in a collective


def hand_over(trainer: Any) -> None:
    """Tell Lightning of them: it kills them on a second Ctrl-C."""
    if _started:
        trainer.strategy.launcher.procs = list(_started)


@cache
def leash() -> None:
    """Have Lightning start ranks such that they end with this process, from their first moment on."""
    from pytorch_lightning.strategies.launchers import subprocess_script as lightnings

    basic, hydra = lightnings._basic_subprocess_cmd, lightnings._hydra_subprocess_cmd

    def of_hydra(local_rank: int) -> tuple[list[str], str]:
        command, cwd = hydra(local_rank)
        return with_parent(command), cwd

    lightnings._basic_subprocess_cmd = lambda: with_parent(basic())
    lightnings._hydra_subprocess_cmd = of_hydra


def by_hand_in_slurm() -> bool:
    """Whether this process was started by hand inside a job of Slurm, by a notebook or a script say.

    Slurm's variables speak of the job's tasks then, and Lightning would wait for tasks that nobody has started.
    """
    others = not started_here() and any(name in os.environ for name in LAUNCHERS)
    return "SLURM_NTASKS" in os.environ and _tasks_of_srun() < 2 and not others


def _tasks_of_srun() -> int:
    """How many tasks the `srun` has that started this process; 0 if none did."""
    given = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(given) if given.isdigit() else 0


def leave_taken_port() -> None:
    """Where this process is to start the ranks and somebody listens at $MASTER_PORT, have Lightning choose another."""
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdigit() or any(name in os.environ for name in LAUNCHERS):
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(port)))
    except OSError as error:
        log.warning("port %s (MASTER_PORT) cannot be used (%s); another one is taken", port, error.strerror)
        del os.environ["MASTER_PORT"]


def _command() -> list[str]:
    import __main__

    if __main__.__spec__ is None:
        return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
    return [sys.executable, "-m", __main__.__spec__.name, *sys.argv[1:]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
