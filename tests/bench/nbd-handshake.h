/* SPDX-License-Identifier: Apache-2.0 */
/* Connect to an NBD server and negotiate an export, within a deadline. */
#ifndef BENCH_NBD_HANDSHAKE_H
#define BENCH_NBD_HANDSHAKE_H

#include <stdbool.h>
#include <stdint.h>

struct nbd_target {
    const char *unix_path; /* or NULL, then host and port */
    const char *tcp_host;
    const char *tcp_port;
    const char *export_name;
    bool structured; /* insist on structured replies */
};

struct nbd_export {
    uint64_t size_bytes;
    uint16_t flags;
};

/* The monotonic clock in nanoseconds. */
uint64_t clock_now_ns(void);

/*
 * Returns a connected, non-blocking socket in the transmission phase, or a negative errno with a
 * message on stderr. Nothing that the server does or leaves undone keeps it past deadline_ns.
 */
int nbd_open(const struct nbd_target *target, uint64_t deadline_ns, struct nbd_export *ret_export);

#endif
