/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The copy engine: empties a work bitmap by copying what is dirty in it to a target. It owns claims, chunks, parallelism, rate
 * limit, zeroes, errors and progress; a policy says where the data comes from and what to do about errors.
 *
 * C1: a run is claimed (dirty to in flight) before it is read, and put back when it was not copied. Nothing is ever cleared
 * after a read.
 */
#ifndef CAIRN_COPY_COPY_H
#define CAIRN_COPY_COPY_H

#include "base/context.h"
#include "bitmaps/bitmap.h"
#include "graph/backend.h"
#include "loop/iobuf.h"
#include "loop/scope.h"

#include <stdbool.h>
#include <stdint.h>

/* How much is copied at once where nothing else is said: what the processor's caches hold. */
#define COPY_CHUNK_DEFAULT ((uint64_t)256 << 10)
/* How much the host copies at once. */
#define COPY_OFFLOAD_CHUNK ((uint64_t)2 << 20)
/* How much may be zeroed at once. */
#define COPY_ZERO_MAX    ((uint64_t)1 << 30)
#define COPY_WORKERS_MAX 64

/* A piece of what is to be copied: data in a buffer, or zeroes. */
struct copy_piece {
    uint64_t offset;
    uint64_t len;
    bool zero;
};

enum copy_error_action { COPY_FAIL, COPY_RETRY, COPY_SKIP };

struct copy_policy {
    /*
     * Gets data of [piece.offset, + piece.len), or of a first part of it: shortens piece.len, sets piece.zero or fills buf.
     * At most buf->size bytes of data, COPY_ZERO_MAX of zeroes. piece.zero comes in as a hint: asking for the extents of data,
     * piece by piece, would cost more than copying it, since a host may walk the whole file to find the next hole.
     */
    int (*co_pull)(void *arg, struct copy_piece *piece, struct iobuf *buf);
    /*
     * Instead of a pull and a push: lets the host copy data of the piece, or of a first part of it, to the target, without a buffer.
     * An error means that nothing has happened that a pull and a push will not set right; only after -EOPNOTSUPP this is asked
     * for again. May be NULL.
     */
    int (*co_offload)(void *arg, struct copy_piece *piece);
    /* The piece is on the target; or is left out, for COPY_SKIP. */
    void (*co_pushed)(void *arg, const struct copy_piece *piece, bool skipped);
    /* Waits while the job is paused; -ECANCELED ends the copy. Called between pieces. */
    int (*co_pause_point)(void *arg);
    /* A worker begins, or ends: how many coroutines come to co_pause_point. */
    void (*worker)(void *arg, bool begins);
    /* What to do about an error. COPY_RETRY tries the same again after the next pause point. */
    enum copy_error_action (*on_error)(void *arg, int error, bool is_read);
    /* Something that goes before all else, such as memory to be freed: true and a range that the work bitmap has. May be NULL. */
    bool (*urgent)(void *arg, uint64_t *ret_offset, uint64_t *ret_len);
};

struct copy {
    /* Set by the owner, then constant. */
    struct bitmap *work;
    struct backend *source; /* asked for extents only; may be NULL */
    struct backend *target;
    const struct copy_policy *policy;
    void *arg;
    uint64_t size;
    uint64_t chunk;
    unsigned workers;
    bool compress; /* the target compresses what has whole granules */
    bool offload;  /* by the policy's co_offload, until that fails */

    /* Atomic. */
    uint64_t speed; /* bytes/s; 0: no limit */

    /* Only touched on the loop that it runs on. */
    uint64_t next; /* where the next claim begins */
    struct co_scope scope;
    int result;
    uint64_t slice_end_ns; /* of the rate limit */
    uint64_t slice_bytes;
    uint64_t hint_offset; /* what the source said last about zeroes */
    uint64_t hint_len;
    bool hint_zero;
};

/* The other fields are set already. */
void copy_init(struct copy *c);
/*
 * Copies until the work bitmap is empty, on the running loop; the backends are attached. 0, -ECANCELED, or the error that
 * the policy failed for; then what was not copied is in the work bitmap.
 */
int co_fn copy_co_run(struct copy *c);
void copy_set_speed(struct copy *c, uint64_t bytes_per_second);

#endif
