#!/bin/bash
# Machines to log in to, on this one: network namespaces with host names of their own, and sshd in each. As root.
#
#   ssh_lab.sh FOLDER up [3]      machines n1 n2 n3 at 10.97.0.1-3; FOLDER gets keys and `ssh_config`
#   ssh_lab.sh FOLDER run CMD…    on the machine that launches (10.97.0.254)
#   ssh_lab.sh FOLDER cut|restore n2 pull its cable, and put it back
#   ssh_lab.sh FOLDER down        ends everything that `up` has started
set -euo pipefail
LAB=$1
what=$2
shift 2

namespace() { # NAME: with its loopback, and a cable to the launching machine unless it is that
  ip netns add "shh-$1"
  ip -n "shh-$1" link set lo up
}

machine() { # NUMBER
  namespace "n$1"
  ip -n shh-launch link add "cable$1" type veth peer name eth0 netns "shh-n$1"
  ip -n shh-launch link set "cable$1" master switch up
  ip -n "shh-n$1" address add "10.97.0.$1/24" dev eth0
  ip -n "shh-n$1" link set eth0 up
  cat > "$LAB/sshd-n$1" <<END
ListenAddress 10.97.0.$1
HostKey $LAB/host_key
AuthorizedKeysFile $LAB/key.pub
PidFile $LAB/n$1.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
END
  ip netns exec "shh-n$1" unshare --uts sh -c "hostname n$1; exec /usr/sbin/sshd -f '$LAB/sshd-n$1' -E '$LAB/n$1.log'"
  printf 'Host n%s\n  HostName 10.97.0.%s\n' "$1" "$1" >> "$LAB/ssh_config"
}

down() {
  for name in $(ip netns list | grep -o '^shh-[a-z0-9]*' || true); do
    ip netns pids "$name" | xargs -r kill -KILL 2>/dev/null || true
    ip netns delete "$name"
  done
}

case $what in
  up)
    down
    mkdir -p "$LAB" /run/sshd
    rm -f "$LAB"/{key,key.pub,host_key,host_key.pub,ssh_config}
    ssh-keygen -q -t ed25519 -N '' -f "$LAB/key"
    ssh-keygen -q -t ed25519 -N '' -f "$LAB/host_key"
    echo "* $(cat "$LAB/host_key.pub")" > "$LAB/known_hosts"
    namespace launch
    ip -n shh-launch link add switch type bridge
    ip -n shh-launch link set switch up
    ip -n shh-launch address add 10.97.0.254/24 dev switch
    for number in $(seq "${1:-3}"); do machine "$number"; done
    printf 'Host *\n  IdentitiesOnly yes\n  UserKnownHostsFile %s/known_hosts\n' "$LAB" >> "$LAB/ssh_config"
    ;;
  run) exec ip netns exec shh-launch "$@" ;;
  cut) ip -n shh-launch link set "cable${1#n}" down ;;
  restore) ip -n shh-launch link set "cable${1#n}" up ;;
  down) down ;;
  *) echo "up, run, cut, restore or down" >&2; exit 2 ;;
esac
