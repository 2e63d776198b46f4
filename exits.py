"""How the processes of a run end: the exit codes that every engine goes by, and a leash to the parent.

The scripts of jobs, Slurm, Kubernetes and SkyPilot decide by these codes what comes next; anything else is a failure.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

FINISHED = 0
FAILURE = 1
BAD_INPUT = 2  # a recipe, an option or a folder that the user has to change
NO_SHOESTRING = 3  # a node without the job's Python, or without this package in it
AGAIN = 85  # asked to stop, and saved: the same command goes on
BAD_NODE = 86  # the same, without this node

KILLED = 128 + signal.SIGKILL  # as a shell says it


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no rank outlives a killed rank 0.

    Linux only; elsewhere nothing.
    """
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# the kernel keeps the leash over `exec`; a parent that has died before it was put on is seen by its process id
_LEASH = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(137); os.execvp(sys.argv[2], sys.argv[2:])"
)


def with_parent(command: Sequence[str]) -> list[str]:
    """The same command, killed by the kernel when this process dies, from its first moment on. Linux only."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *command]
