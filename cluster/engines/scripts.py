"""Bash that several engines share: the tasks of one node under torchrun, and the loop over attempts."""

from __future__ import annotations

import shlex

from ...exits import AGAIN, BAD_INPUT, BAD_NODE, NO_SHOESTRING
from ..config.document import ClusterError
from ..environment import prologue, quoted
from ..job import Job

ATTEMPTS = '"$PYTHON" -m shoestring.cluster.node.attempts'

# all torchrun's answers are 1 or 0, whatever its workers said: their records are read instead
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def head(job: Job, title: str) -> str:
    """The first lines of a script: what it is, and everything a task needs around it."""
    return (
        "#!/bin/bash\n"
        f"# {title}\n"
        "set -o pipefail  # and not -e: exit codes are the protocol "
        f"({AGAIN} saved, run me again; {BAD_NODE} a bad node)\n"
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


def node_script(job: Job) -> str:
    """A script for the tasks of one node. `cluster/node/heartbeat.py` tells what it hears on its standard input."""
    if job.cluster.environment.container:
        raise ClusterError(
            f"environment.container: found {job.cluster.environment.container.image}; allowed with engine "
            f"{job.cluster.engine}: null. Give environment.venv or environment.python"
        )
    command = " ".join(map(shlex.quote, job.train()[1:]))
    return (
        f"{head(job, 'The tasks of one node: bash node.sh NODE_RANK MASTER_ADDRESS MASTER_PORT ATTEMPT')}"
        f'command -v "$PYTHON" >/dev/null || {_refuse("there is no $PYTHON")}\n'
        '"$PYTHON" -c "import shoestring.cluster.node.heartbeat" ||\n'
        f"  {_refuse('$PYTHON cannot import shoestring')}\n"
        'export SHOESTRING_ATTEMPT="$4"\n'
        'exec "$PYTHON" -m shoestring.cluster.node.heartbeat \\\n'
        f'  --node-rank "$1" --tasks {job.devices_per_node} --lead {job.lead_seconds} --master "$2" -- \\\n'
        f'  "$PYTHON" -m torch.distributed.run --nnodes={job.nodes} --node-rank="$1" \\\n'
        f'  --nproc-per-node={job.devices_per_node} --master-addr="$2" --master-port="$3" --max-restarts=0 \\\n'
        f"  {command}\n"
    )


def _refuse(why: str) -> str:
    return f'{{ echo "[shoestring] $(hostname): {why}" >&2; exit {NO_SHOESTRING}; }}'


def controller(job: Job, title: str, hosts: str, engine: str) -> str:
    """A script that stays where it was launched and runs attempt after attempt until the run is finished.

    `hosts`: words of the shell, more of them than nodes are spares. `engine`: two functions of the shell,
    `address HOST`, which prints where the other nodes find it, and `node RANK HOST ADDRESS PORT`, which runs the
    tasks of one node and returns 255 if it has lost the connection.
    """
    return (
        "#!/bin/bash\n"
        f"# {title}\n"
        "ending= warned=\n"
        "trap 'warned=1' USR1      # save, and run again\n"
        "trap 'ending=1' TERM INT  # save, and end\n"
        "trap '' PIPE\n"
        f"JOB={quoted(job.job_dir)}\n"
        "PYTHON=${SHOESTRING_PYTHON:-python3}\n"
        f"cd {quoted(job.workdir)} || exit {BAD_INPUT}\n"
        f"HOSTS=({hosts})\n"
        f"{engine}"
        f"{_CONTROLLER.replace('NODES', str(job.nodes)).replace('LEAD', str(job.lead_seconds))}"
    )


_CONTROLLER = r"""
attempts() { "$PYTHON" -m shoestring.cluster.node.attempts "$1" "$JOB" --attempt "$SHOESTRING_ATTEMPT" "${@:2}"; }
close() {  # note how the attempt ended, and what comes next
  answer=$(attempts end --code "$code" --pool "$(IFS=,; echo "${HOSTS[*]}")" \
    --lost "$(IFS=,; echo "${lost[*]}")" ${ending:+--cancelled} ${warned:+--warned})
  read -r next code <<<"$answer"
}
label() { while IFS= read -r line; do printf '%s%s\n' "$1" "$line"; done; }

pipes=$(mktemp -d) || exit 1
trap 'rm -rf "$pipes"' EXIT
export SHOESTRING_ATTEMPT
for ((SHOESTRING_ATTEMPT = 0; ; SHOESTRING_ATTEMPT++)); do
  mapfile -t nodes < <(printf '%s\n' "${HOSTS[@]}" | grep -vxFf <(cat "$JOB/excluded" 2>/dev/null) | head -n NODES)
  seconds=$(attempts begin --nodes "$(IFS=,; echo "${nodes[*]}")") || exit 1
  code=0 lost=() pids=() lines=() kill= begun=$SECONDS
  master=$(address "${nodes[0]}")
  port=$((20000 + RANDOM % 12000))
  if [ -z "$master" ]; then
    echo "[shoestring] ${nodes[0]} does not say at which address the others find it" >&2
    code=255 lost=("${nodes[0]}") nodes=()
  fi

  # each node has a line that it listens to; when this script dies, the lines end, and with them the tasks
  for rank in "${!nodes[@]}"; do
    mkfifo "$pipes/$SHOESTRING_ATTEMPT.$rank"
    node "$rank" "${nodes[rank]}" "$master" "$port" <"$pipes/$SHOESTRING_ATTEMPT.$rank" &
    pids[rank]=$!
  done
  for rank in "${!nodes[@]}"; do
    exec {line}>"$pipes/$SHOESTRING_ATTEMPT.$rank"
    lines[rank]=$line
  done

  while [ "${#pids[@]}" -gt 0 ]; do
    [ $((SECONDS - begun)) -ge $((seconds - LEAD)) ] && warned=1
    word=on
    [ -n "$ending$warned" ] && word=USR1
    [ -n "$kill" ] && [ $SECONDS -ge "$kill" ] && word=KILL
    for rank in "${!pids[@]}"; do
      echo "$word" 2>/dev/null >&"${lines[rank]}"
      kill -0 "${pids[rank]}" 2>/dev/null && continue
      wait "${pids[rank]}"
      status=$?
      unset "pids[rank]"
      [ $status = 0 ] && continue
      code=$status
      [ $status = 255 ] && lost+=("${nodes[rank]}")
      # the others cannot go on; without a node they cannot even save
      case $status in
        1) kill=${kill:-$((SECONDS + LEAD))} ;;
        *) kill=$SECONDS ;;
      esac
    done
    sleep 1 &
    wait $!
  done
  for line in "${lines[@]}"; do exec {line}>&-; done
  close
  [ "$next" = requeue ] && [ -n "$ending" ] && close
  [ "$next" = requeue ] || exit "$code"
  warned=
done
"""
