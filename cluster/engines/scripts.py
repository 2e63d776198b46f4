"""Bash that several engines share: the tasks of one node under torchrun, and the loop over attempts."""

from __future__ import annotations

import shlex

from ..environment import prologue, quoted
from ..job import Job

ATTEMPTS = '"$PYTHON" -m shoestring.cluster.attempts'

# all torchrun's answers are 1 or 0, whatever its workers said: their records are read instead
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def head(job: Job, title: str) -> str:
    """The first lines of a script: what it is, and everything a task needs around it."""
    return (
        "#!/bin/bash\n"
        f"# {title}\n"
        "set -o pipefail  # and not -e: exit codes are the protocol (85 saved, run me again; 86 a bad node)\n"
        f"{prologue(job)}"
        f"JOB={quoted(job.job_dir)}\n"  # after the job's own variables, which may have the same names
        f"PYTHON={quoted(job.python)}\n"
    )


def torchrun(job: Job, nodes: str, node_rank: str, master: str, port: str) -> str:
    """The command that runs the tasks of one node; told to save `lead_seconds` before `$seconds` are over.

    `nodes`, `node_rank`, `master` and `port` are words of the shell. Sets `$child`.
    """
    command = " ".join(map(shlex.quote, job.train()[1:]))
    return (
        f"export PET_SHUTDOWN_TIMEOUT={job.lead_seconds} PET_SIGNALS_TO_HANDLE={SIGNALS}\n"
        f"timeout --signal=USR1 --kill-after={job.lead_seconds} $((seconds - {job.lead_seconds})) \\\n"
        f'  "$PYTHON" -m torch.distributed.run --nnodes={nodes} --node-rank={node_rank} '
        f"--nproc-per-node={job.devices_per_node} \\\n"
        f"  --master-addr={master} --master-port={port} --max-restarts=0 \\\n"
        f"  {command} &\n"
        "child=$!\n"
    )


# a trap interrupts `wait`, which then has to be called again
WAIT = 'while :; do wait "$child"; code=$?; kill -0 "$child" 2>/dev/null || break; done\n'
