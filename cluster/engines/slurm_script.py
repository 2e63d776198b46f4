"""The two scripts of a job on Slurm: `job.sh`, which sbatch is given, and `task.sh`, which srun starts on every device.

job.sh outlives its tasks and knows why they are to end: Slurm warns it with USR1 before the time limit, `scancel` sends
it TERM, and at a preemption it hears nothing (only the tasks do). What Slurm does not do by itself is done there: a job
that has saved and ended within its grace is not run again unless it asks.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

from ...exits import AGAIN, BAD_INPUT, BAD_NODE, FINISHED
from ..config.document import ClusterError
from ..environment import quoted
from ..job import Job, as_time
from .background import LOG
from .scripts import ATTEMPTS, WAIT, head


def header(job: Job) -> str:
    """The `#SBATCH` lines: one spec decides nodes, tasks, devices and time."""
    options = job.cluster.options
    values = {
        "job-name": job.id,
        "nodes": job.nodes,
        "ntasks-per-node": job.devices_per_node,
        **gpus(job),
        "cpus-per-task": options.cpus_per_task,
        "mem": options.memory_per_node,
        "time": as_time(60 * minutes(job)),
        "signal": f"B:USR1@{job.lead_seconds}",
        "output": _in_header(f"{job.job_dir}/{LOG}").replace("%", "%%"),
        **{key: getattr(options, key) for key in ("partition", "account", "qos", "constraint", "reservation")},
    }
    lines = [f"--{key}={value}" for key, value in values.items() if value is not None]
    return "".join(f"#SBATCH {line}\n" for line in [*lines, "--requeue", "--open-mode=append", *options.extra])


def minutes(job: Job) -> int:
    """The time limit of an attempt. Slurm counts whole minutes; job.sh keeps to the second."""
    return math.ceil(job.attempt_seconds / 60)


def gpus(job: Job) -> dict[str, Any]:
    """Return the sbatch option that requests GPUs, if the job needs any."""
    options = job.cluster.options
    if not job.on_gpus or options.gpus == "none":
        return {}
    kind = f"{options.gpu_type}:" if options.gpu_type else ""
    if options.gpus == "gres":
        return {"gres": f"gpu:{kind}{job.devices_per_node}"}
    return {"gpus-per-node": f"{kind}{job.devices_per_node}"}


def _in_header(path: str) -> str:
    """A path as sbatch reads it in a header; ClusterError if it cannot be told there."""
    if re.search(r"[\x00-\x1f\x7f\"'\\]", path):
        raise ClusterError(f"{path!r}: found a quote, backslash or control character; Slurm cannot write there")
    return f'"{path}"' if re.search(r"[^\w/.%+@=:,-]", path) else path


def job_script(job: Job) -> str:
    """job.sh: one attempt, between its record's beginning and end, and what Slurm is to do next."""
    in_step, attempts = _container(job)
    shebang, rest = head(job, f"Job {job.id}: {job.nodes} nodes x {job.devices_per_node} tasks.").split("\n", 1)
    return (
        f"{shebang}\n{header(job)}{rest}"
        f"LEAD={job.lead_seconds}    # seconds before its end that an attempt begins to save\n"
        f"MINUTES={minutes(job)}  # of an attempt\n"
        f"IN_STEP=({in_step})\n"
        "attempts() {\n"
        f'  {attempts} "$@"\n'
        "}\n"
        f"{_BEFORE}{WAIT}{_AFTER}"
    )


_BEFORE = r"""
export SHOESTRING_ATTEMPT=${SLURM_RESTART_COUNT:-0}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + SHOESTRING_ATTEMPT) % 12000))
export SLURM_EXPORT_ENV=ALL  # to the tasks, also if the job was submitted with less
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over

fact() {  # one of the things that Slurm knows of this job
  scontrol show job -o "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "/^$1=/{s///p;q}"
}
request_save() {  # of the tasks; again and again, since one that has just started does not handle signals yet
  [ -z "$child" ] || while kill -USR1 "$child" 2>/dev/null; do sleep 5; done &
}
child= ending= warned= code=1
trap 'warned=1; request_save' USR1  # the time limit is near
trap 'ending=1; request_save' TERM  # scancel, or Slurm takes the nodes away

seconds=$(attempts begin "$JOB" --attempt "$SHOESTRING_ATTEMPT" --nodes "${nodes//$'\n'/,}" \
  --engine-id "$SLURM_JOB_ID") || exit 1
[ $(((seconds + 59) / 60)) -ge "$MINUTES" ] ||
  scontrol update JobId="$SLURM_JOB_ID" TimeLimit=$(((seconds + 59) / 60))
[ -n "$ending" ] || {
timeout --signal=USR1 --kill-after="$LEAD" $((seconds - LEAD)) \
  srun --label --kill-on-bad-exit=1 --wait=0 --distribution=block "${IN_STEP[@]}" bash "$JOB/task.sh" &
child=$!
[ -z "$ending$warned" ] || request_save
"""

_AFTER = r"""}
trap '' USR1 TERM  # what follows is short and has to be done; its commands are spared too

again=$(fact Restarts)
[ "${again:-0}" -gt "$SHOESTRING_ATTEMPT" ] || again=  # else Slurm runs the job again by itself
[ "$code" != 124 ] || warned=1
[ "$(fact Reason)" != TimeLimit ] || warned=1 ending=
[ -z "$again" ] || ending=
read -r next verdict < <(attempts end "$JOB" --attempt "$SHOESTRING_ATTEMPT" --code "$code" \
  ${ending:+--cancelled} ${warned:+--warned} ${again:+--again})

if [ "$next" = requeue ]; then
  # not a job that somebody is ending just now: that would bring it back
  if [ -z "$again" ] && { [ "$(fact JobState)" = RUNNING ] || [ "$(fact Reason)" = TimeLimit ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  if [ -s "$JOB/excluded" ]; then  # Slurm takes this of a waiting job only
    also=$(fact ExcNodeList | grep -v null)
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(paste -sd, "$JOB/excluded")${also:+,$also}"
  fi
elif [ -n "$again$ending" ]; then
  scancel "$SLURM_JOB_ID"
fi
exit "${verdict:-1}"
"""


def task_script(job: Job) -> str:
    """task.sh: one process on one device, inside of the container if there is one."""
    secrets = [f". {quoted(job.job_dir + '/secrets.sh')} || exit {BAD_INPUT}"] if job.cluster.secrets else []
    lines = [
        "#!/bin/bash",
        "# One task of the job, as srun starts it.",
        "trap '' USR1 TERM  # the training handles them; before it does, and here, they must not kill",
        f"cd {quoted(job.workdir)} || exit {BAD_INPUT}",
        f". {quoted(job.job_dir + '/env.sh')} || exit {BAD_INPUT}",
        *secrets,
        "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID WORLD_SIZE=$SLURM_NTASKS",
        f"export LOCAL_WORLD_SIZE={job.devices_per_node}",
        shlex.join(job.train()),
        "code=$?",
        "# srun ends all tasks as soon as one fails; these two are no failures, and the task's record keeps them",
        f'[ "$code" != {AGAIN} ] && [ "$code" != {BAD_NODE} ] || code={FINISHED}',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _container(job: Job) -> tuple[str, str]:
    """What brings a command into the job's container, if it has one: words between `srun` and the command, and the
    whole command that keeps the record of attempts, which runs on the first node."""
    spec = job.cluster.environment.container
    if spec is None:
        return "", ATTEMPTS
    places = list(dict.fromkeys(filter(None, (job.run_dir, job.workdir, job.home))))
    for place in places:
        if re.search(r"[,:\x00-\x1f]", place):
            raise ClusterError(f"{place!r}: found a comma, colon or control character; no container can mount that")
    is_apptainer = spec.image.endswith(".sif") or "://" in spec.image
    if spec.runtime == "apptainer" or (spec.runtime == "auto" and is_apptainer):
        words = _apptainer(job, spec.image, places)
        return words, f"{words} {ATTEMPTS}"
    words = shlex.join([
        f"--container-image={_pyxis(spec.image)}", f"--container-mounts={','.join(f'{p}:{p}' for p in places)}",
        f"--container-workdir={job.workdir}",
    ])  # fmt: skip
    return words, f"srun --overlap --nodes=1 --ntasks=1 {words} {ATTEMPTS}"


def _pyxis(image: str) -> str:
    """An image in Pyxis's spelling, which sets the registry apart: ghcr.io#team/train:1."""
    registry, slash, rest = image.partition("/")
    named = slash and "#" not in image and re.search(r"[.:]", registry) and not image.startswith(".")
    return f"{registry}#{rest}" if named else image


def _apptainer(job: Job, image: str, places: Sequence[str]) -> str:
    is_file = image.startswith(("/", ".")) or "://" in image or image.endswith(".sif")
    gpu = ["--nv"] if job.on_gpus else []
    binds = [word for place in places for word in ("--bind", place)]
    name = image if is_file else f"docker://{image}"
    return shlex.join(["apptainer", "exec", *gpu, *binds, "--pwd", job.workdir, name])
