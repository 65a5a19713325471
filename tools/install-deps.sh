#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs what building and testing need, on Debian 12. Does nothing when all is there already.
#
#   tools/install-deps.sh           install what is missing (needs root)
#   tools/install-deps.sh --list    print the packages, one per line
set -eu

build='gcc libc6-dev make meson ninja-build pkg-config python3 git scdoc liburing-dev libjansson-dev libssl-dev zlib1g-dev libzstd-dev'
checks='e2fsprogs mount clang libclang-rt-14-dev clang-format clang-tidy binutils patch libcmocka-dev'
peers='qemu-utils qemu-system-common nbdkit libnbd-bin python3-libnbd python3-pytest fio socat strace file cryptsetup-bin'
packages="$build $checks $peers"

if [ "${1:-}" = --list ]; then
    printf '%s\n' $packages
    exit 0
fi

missing=
for package in $packages; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) || status=
    [ "$status" = installed ] || missing="$missing $package"
done
if [ -z "$missing" ]; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "missing packages:$missing; install them, or run $0 as root" >&2
    exit 1
fi

export DEBIAN_FRONTEND=noninteractive
install_missing()
{
    # The unattended installer of a fresh machine may hold the lock for a while.
    apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing
}

echo "installing:$missing"
if install_missing; then
    exit 0
fi
echo 'the package lists are old or absent: fetching them'
for attempt in 1 2 3; do
    if apt-get -q -o DPkg::Lock::Timeout=300 update && install_missing; then
        exit 0
    fi
    echo "attempt $attempt of 3 failed" >&2
    sleep $((attempt * 5))
done
exit 1
