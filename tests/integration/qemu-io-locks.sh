#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Image files between qemu-io and cairnd: each refuses the other's writer, by locks that both know, and readers share.
set -u

for tool in qemu-img qemu-io; do
    command -v $tool >/dev/null || { echo "requires $tool"; exit 77; }
done

failures=0
holder=

fail() {
    echo "FAIL: $*"
    failures=$((failures + 1))
}

# A format with metadata tolerates no other writer.
qemu-img create -q -f qcow2 a.img 1M || exit 1

wait_for() { # what, command...
    local what=$1
    shift
    for _ in $(seq 500); do
        "$@" && return
        sleep 0.01
    done
    fail "waited 5 s for $what"
}

# cairnd serves a.img with these node options, writable or not, in the background.
serve() { # node options, writable
    rm -f nbd.sock
    "$CAIRND" --blockdev "driver=file,node-name=n,filename=a.img$1" \
        --nbd-server addr.type=unix,addr.path=nbd.sock \
        --export "type=nbd,id=e,node-name=n,writable=$2" >cairnd.log 2>&1 &
    holder=$!
}

stop() {
    kill "$holder" 2>/dev/null
    wait "$holder" 2>/dev/null
}

# Does cairnd refuse to serve, and say this?
must_refuse() { # node options, writable, text
    serve "$1" "$2"
    for _ in $(seq 500); do
        kill -0 "$holder" 2>/dev/null || break
        sleep 0.01
    done
    kill -0 "$holder" 2>/dev/null && fail "cairnd serves an image that qemu-io holds"
    stop
    grep -q "$3" cairnd.log || fail "cairnd says: $(cat cairnd.log)"
}

must_serve() { # node options, writable
    serve "$1" "$2"
    wait_for "cairnd to serve with '$1'" test -S nbd.sock
}

# cairnd writes: no other writer that wants to be alone, and no reader that wants rest.
must_serve "" on
qemu-io -f qcow2 -c 'write 0 4k' a.img >qemu.log 2>&1 && fail "qemu-io writes what cairnd writes"
grep -q 'lock' qemu.log || fail "qemu-io says: $(cat qemu.log)"
qemu-io -U -r -f qcow2 -c 'read 0 4k' a.img >qemu.log 2>&1 || fail "-U is refused: $(cat qemu.log)"
stop

# When it has gone, so have its locks.
qemu-io -f qcow2 -c 'write 0 4k' a.img >qemu.log 2>&1 || fail "a lock is left: $(cat qemu.log)"

# Readers do not mind each other.
must_serve ",read-only=on" off
qemu-io -r -f qcow2 -c 'read 0 4k' a.img >qemu.log 2>&1 || fail "readers refuse each other: $(cat qemu.log)"
stop

# qemu-io writes.
mkfifo commands
qemu-io -f qcow2 a.img <commands >qemu.log 2>&1 &
peer=$!
exec 3>commands
echo 'write 0 4k' >&3
wait_for "qemu-io" grep -q 'wrote 4096' qemu.log
must_refuse "" on "cannot get write access to file 'a.img': is another process using it?"
must_serve ",read-only=on,force-share=on" off
stop
must_serve ",locking=off" on
stop
exec 3>&-
wait $peer
must_serve "" on
stop

[ $failures = 0 ]
