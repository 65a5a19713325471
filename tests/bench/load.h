/* SPDX-License-Identifier: Apache-2.0 */
/* The seam between the load generator's engine (load.c) and its workloads (nbd-load.c, load-verify.c). */
#ifndef BENCH_LOAD_H
#define BENCH_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbd-handshake.h"
#include "nbd-wire.h"

struct load;
struct load_conn;

/* One place in a connection's queue, and the request that holds it. */
struct load_slot {
    /* Filled in by the workload's next. */
    enum nbd_command command;
    uint64_t offset;
    uint32_t length;
    uint64_t start_ns; /* 0: the engine takes the time of the batch */
    uint8_t *data;     /* what a write sends, where a read goes; NULL: a read's data is dropped */

    /* The engine's. */
    bool busy;
    uint32_t generation; /* half of the cookie: a late or invented answer does not match */
    uint32_t got;        /* bytes of a read that have come */
    uint32_t error;      /* an NBD error number that the server answered */
    uint8_t wire[NBD_REQUEST_BYTES];
};

struct load_workload {
    /* Fills in the next request of conn. Returns false when there is nothing to issue now. */
    bool (*next)(struct load *l, struct load_conn *conn, struct load_slot *slot, uint64_t now_ns);
    /* A request was answered; slot->error tells how. A negative errno ends the run. */
    int (*done)(struct load *l, struct load_conn *conn, struct load_slot *slot, uint64_t now_ns);
    /*
     * Called once per round. Returns 1 to end the run, 0 to go on. *ret_wake_ns says when to call
     * again at the latest; the engine calls anyway when answers come and ten times a second.
     */
    int (*round)(struct load *l, uint64_t now_ns, uint64_t *ret_wake_ns);
};

struct load_conn {
    unsigned index;
    int fd;
    bool wants_out; /* the kernel's buffer was full: EPOLLOUT is armed */

    /* The queue: slots[], a stack of the free ones, a ring of those that wait to be sent. */
    struct load_slot *slots;
    uint32_t *free;
    uint32_t n_free;
    uint32_t *tx;
    uint32_t tx_head;
    uint32_t tx_count;
    size_t tx_sent; /* bytes of the first in the ring that are out */

    /* The parser, between two receives. */
    uint8_t residue[64]; /* the beginning of a header */
    size_t residue_len;
    struct load_slot *rx_slot; /* whose data is being read, or NULL */
    uint64_t rx_at;            /* where it goes in the slot's data */
    uint64_t rx_left;
    uint64_t rx_skip; /* bytes to drop before the next header: an error's text */
    bool rx_last;     /* the slot is finished when rx_left and rx_skip are 0 */

    uint64_t position; /* for sequential workloads */
};

struct load {
    /* Set before load_open, then constant. */
    struct nbd_target target;
    unsigned n_conns;
    unsigned depth;
    uint64_t timeout_ns;
    const struct load_workload *workload;
    void *state; /* the workload's */

    /* Set by load_open, then constant. */
    struct nbd_export export;
    struct load_conn *conns;

    /* Running. */
    int epoll_fd;
    uint8_t *rx; /* one receive buffer for all connections */
    uint64_t in_flight;
    uint64_t n_sends;
    uint64_t n_recvs;
};

/* Connects all connections. Returns 0 or a negative errno; the message is on stderr. */
int load_open(struct load *l);

/*
 * Runs the workload until it says that it is over. Returns 0 or a negative errno with the message
 * on stderr: -ETIMEDOUT when a request has gone unanswered for timeout_ns, -EPROTO when the server
 * breaks the protocol.
 */
int load_run(struct load *l);

/* Takes leave of the server and releases everything; works on what a failed load_open left, too. */
void load_close(struct load *l);

/* load-verify.c: write stamped blocks, read them back, compare. */
struct verify_options {
    uint64_t size_bytes; /* the region from 0 */
    uint32_t unit_bytes;
    uint32_t max_bytes; /* the longest request */
    uint64_t duration_ns;
    unsigned read_percent;
    uint64_t seed;
};

struct verify_result {
    uint64_t units_written;
    uint64_t units_checked;
    uint64_t mismatches;
    uint64_t errors;
};

/* Returns 0 when the run came to its end (mismatches are in the result), or a negative errno. */
int verify_run(struct load *l, const struct verify_options *options,
               struct verify_result *ret_result);

/* A small random generator; state must not be 0. */
static inline uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    *state = x;
    return x * 0x9e3779b97f4a7c15ULL;
}

/* A number below limit, from the generator's high bits. */
static inline uint64_t random_below(uint64_t *state, uint64_t limit)
{
    return (uint64_t)(((__uint128_t)random_next(state) * limit) >> 64);
}

#endif
