"""How the processes of a run end: the exit codes that every engine goes by, and a leash to the parent.

The scripts of jobs, Slurm, Kubernetes and SkyPilot decide by these codes what comes next; anything else is a failure.
"""

from __future__ import annotations

import signal
import sys

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
