#!/bin/bash
# What the cluster tests need of Debian or Ubuntu, as root: one package a line, with the reason.
set -euo pipefail

packages=(
  iproute2       # network namespaces, one a node
  openssh-client # ssh, ssh-keygen
  openssh-server # sshd on each node
  munge          # Slurm's authentication
  slurmctld      # Slurm's controller
  slurmd         # Slurm on each node
  slurm-client   # sbatch, srun, scontrol, squeue, scancel
)

dpkg -s "${packages[@]}" > /dev/null 2>&1 && exit 0

# the labs start daemons of their own, so none of the packages' is to start
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null
