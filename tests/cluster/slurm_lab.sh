#!/bin/bash
# A Slurm cluster of three nodes on one machine, for tests: real daemons, each node in a network namespace of its own.
#
#   slurm_lab.sh up          start it, and wait until all nodes are idle
#   slurm_lab.sh env         lines to eval: sbatch, squeue, scontrol, scancel of this cluster on PATH
#   slurm_lab.sh cut n2      pull a node's network cable
#   slurm_lab.sh restore n2  plug it in again, switch the node off and on, and wait until it is idle
#   slurm_lab.sh down        end every process in the namespaces and remove them; may be called at any time
#
# Needs root and what install.sh installs. All its files are in $SHOESTRING_LAB (default /var/tmp/shoestring-slurm),
# which every node sees, like everything else on this machine. Nodes n1 to n3 have four CPUs and two GPUs each, on
# paper only. Partitions: `batch`, whose jobs push aside those of `spot` (60 s of grace, then requeued), and `short`
# (one hour at most).
set -euo pipefail
lab=${SHOESTRING_LAB:-/var/tmp/shoestring-slurm}
commands=${SLURM_COMMANDS:-/usr/bin} # where sbatch and its like are installed
subnet=10.98.0
nodes=(n1 n2 n3)
login=shl-login # the namespace of the controller; sbatch and its like run there
export SLURM_CONF=$lab/slurm.conf

inside() { # NAMESPACE HOSTNAME COMMAND…
  ip netns exec "$1" unshare --uts sh -c 'hostname "$0" && exec "$@"' "${@:2}"
}

configuration() {
  cat << END
ClusterName=shoestring
SlurmctldHost=login
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its old credential has expired: 2 minutes if nothing is said
AuthInfo=socket=$lab/munge.socket,cred_expire=5
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool/%n
SlurmctldPidFile=$lab/slurmctld.pid
SlurmdPidFile=$lab/slurmd-%n.pid
SlurmctldLogFile=$lab/slurmctld.log
SlurmdLogFile=$lab/slurmd-%n.log
PlugStackConfig=$lab/plugstack.conf
MailProg=/bin/true
MpiDefault=none
# no cgroups: the same everywhere
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# quick to notice a lost node; KillWait as it is where nobody has set it
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
KillWait=30
ReturnToService=2
# the nodes have more CPUs than the machine
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-${#nodes[@]}] CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=batch Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
PartitionName=spot Nodes=ALL PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=short Nodes=ALL PriorityTier=1 PreemptMode=OFF MaxTime=60
END
}

hosts() {
  echo "127.0.0.1 localhost"
  echo "$subnet.254 login"
  for i in "${!nodes[@]}"; do echo "$subnet.$((i + 1)) ${nodes[i]}"; done
}

client() { # a command as the login node has it; on a node (it has an interface shl0 too) as it is
  cat << END
#!/bin/sh
export SLURM_CONF=$SLURM_CONF
[ -e /sys/class/net/shl0 ] || exec ip netns exec $login unshare --uts sh -c 'hostname login && exec "\$@"' sh $commands/$1 "\$@"
exec $commands/$1 "\$@"
END
}

files() {
  mkdir -p "$lab"/{bin,state,spool,dev}
  configuration > "$SLURM_CONF"
  : > "$lab/plugstack.conf"
  echo "CgroupPlugin=cgroup/v1" > "$lab/cgroup.conf"
  for device in 0 1; do mknod "$lab/dev/gpu$device" c 1 3; done # nothing opens them
  echo "NodeName=n[1-${#nodes[@]}] Name=gpu File=$lab/dev/gpu[0-1]" > "$lab/gres.conf"
  for command in sbatch srun squeue scancel scontrol sinfo sacct; do
    client "$command" > "$lab/bin/$command"
    chmod 755 "$lab/bin/$command"
  done
  (umask 077 && head -c 1024 /dev/urandom > "$lab/munge.key")
}

start() { # NODE
  mkdir -p "$lab/spool/$1"
  inside "shl-$1" "$1" slurmd -N "$1"
}

network() { # a switch at the login node, a cable to each node; `ip netns exec` shows each its own /etc/hosts
  local i
  for space in "$login" "${nodes[@]/#/shl-}"; do
    mkdir -p "/etc/netns/$space"
    hosts > "/etc/netns/$space/hosts"
    ip netns add "$space"
    ip -n "$space" link set lo up
  done
  ip -n "$login" link add shl0 type bridge
  ip -n "$login" addr add "$subnet.254/24" dev shl0
  ip -n "$login" link set shl0 up
  for i in "${!nodes[@]}"; do
    ip -n "$login" link add "${nodes[i]}" type veth peer name shl0 netns "shl-${nodes[i]}"
    ip -n "$login" link set "${nodes[i]}" master shl0 up
    ip -n "shl-${nodes[i]}" addr add "$subnet.$((i + 1))/24" dev shl0
    ip -n "shl-${nodes[i]}" link set shl0 up
  done
}

idle() { # wait until each of the nodes is: N NODES
  for _ in $(seq 150); do
    [ "$("$lab/bin/sinfo" -h -N -p batch -n "$2" -t idle -o %N | wc -l)" = "$1" ] && return
    sleep 0.2
  done
  "$lab/bin/sinfo" >&2
  echo "the nodes $2 are not idle; see $lab/*.log" >&2
  return 1
}

up() {
  [ "$(id -u)" = 0 ] || { echo "root is needed: for network namespaces" >&2; exit 1; }
  down
  files
  network
  inside "$login" login munged --force --key-file="$lab/munge.key" --socket="$lab/munge.socket" \
    --pid-file="$lab/munged.pid" --log-file="$lab/munged.log" --seed-file="$lab/munged.seed"
  inside "$login" login slurmctld -c
  for node in "${nodes[@]}"; do start "$node"; done
  idle "${#nodes[@]}" "$(IFS=,; echo "${nodes[*]}")"
}

spaces() {
  ip netns list 2> /dev/null | awk '/^shl-/ { print $1 }'
}

signal() { # SIGNAL NAMESPACE…: to every process there; fails when there is none
  local found
  found=$(for space in "${@:2}"; do ip netns pids "$space"; done)
  # shellcheck disable=SC2086
  [ -n "$found" ] && { kill "-$1" $found 2> /dev/null || true; }
}

down() {
  local all
  mapfile -t all < <(spaces)
  signal TERM "${all[@]}" && for _ in $(seq 20); do
    sleep 0.1
    signal 0 "${all[@]}" || break
  done
  while signal KILL "${all[@]}"; do sleep 0.1; done
  for space in "${all[@]}"; do
    ip netns del "$space"
    rm -rf "/etc/netns/$space"
  done
  rmdir --ignore-fail-on-non-empty /etc/netns 2> /dev/null || true
  rm -rf "$lab"
}

case ${1:-} in
  up | down) "$1" ;;
  env) echo "export PATH=$lab/bin:\$PATH SLURM_CONF=$SLURM_CONF" ;;
  cut) ip -n "shl-$2" link set shl0 down ;;
  restore)
    while signal KILL "shl-$2"; do sleep 0.1; done
    ip -n "shl-$2" link set shl0 up
    start "$2"
    idle 1 "$2"
    ;;
  *)
    sed -n '2,/^set/{/^#/p}' "$0"
    exit 2
    ;;
esac
