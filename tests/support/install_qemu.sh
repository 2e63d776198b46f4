#!/bin/sh
# QEMU's user-mode emulator of x86 CPUs, where it is not there yet and this machine lets us: Debian, root.
set -eu
if ! command -v qemu-x86_64 >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-user >/dev/null
fi
