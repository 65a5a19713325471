/* SPDX-License-Identifier: Apache-2.0 */
/* The copy engine. Workers are coroutines of one scope; each claims, pulls, pushes, until there is nothing left to claim. */
#include "copy/copy.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/macros.h"
#include "loop/scope.h"

#include <assert.h>
#include <errno.h>

/*
 * How long the host may take for one copy. Meanwhile it is inside source and target, so that a change of the source would wait for the
 * target's host (P4): past the bound the wait ends, and all else is pulled and pushed.
 */
#define OFFLOAD_NS NS_PER_S

/* The rate limit gives out its bytes in slices of this length. */
#define SLICE_NS (100 * NS_PER_MS)

void copy_init(struct copy *c)
{
    assert(c->chunk && c->workers && c->workers <= COPY_WORKERS_MAX);
    c->next = 0;
    c->result = 0;
    c->slice_end_ns = 0;
    c->slice_bytes = 0;
    c->hint_len = 0;
    co_scope_init(&c->scope);
}

void copy_set_speed(struct copy *c, uint64_t bytes_per_second)
{
    atomic_set(&c->speed, bytes_per_second);
}

/* Waits until the rate limit has room; a slice that was overdrawn is paid for by the next ones. */
static int co_fn wait_for_rate(struct copy *c, uint64_t bytes)
{
    uint64_t speed;

    while ((speed = atomic_get(&c->speed))) {
        uint64_t per_slice = MAX(speed * SLICE_NS / NS_PER_S, (uint64_t)1);
        uint64_t now = loop_clock();
        int r;

        if (now >= c->slice_end_ns) {
            c->slice_end_ns = now + SLICE_NS;
            c->slice_bytes -= MIN(c->slice_bytes, per_slice);
        }
        if (c->slice_bytes < per_slice) {
            c->slice_bytes += bytes;
            return 0;
        }
        r = co_sleep_until(c->slice_end_ns);
        if (r == 0)
            r = c->policy->co_pause_point(c->arg); /* at a low rate the wait is long */
        if (r < 0)
            return r;
    }
    return 0;
}

/* How far zeroes, or data, reach from an offset, as the source said lately: a hint. */
static uint64_t co_fn look_ahead(struct copy *c, uint64_t offset, bool *ret_zero)
{
    struct extent v[1];
    struct extents extents = {.v = v, .max = 1};
    struct request req = {
        .kind = REQUEST_EXTENTS,
        .offset = offset,
        .len = MIN(c->size - offset, COPY_ZERO_MAX),
        .extents = &extents,
    };

    *ret_zero = false;
    if (!c->source)
        return c->chunk;
    if (offset < c->hint_offset || offset >= c->hint_offset + c->hint_len) {
        bool told = backend_co_request(c->source, &req) == 0 && extents.count; /* yields */

        c->hint_offset = offset;
        c->hint_len = told ? v[0].len : req.len;
        c->hint_zero = told && (v[0].flags & EXTENT_ZERO);
    }
    *ret_zero = c->hint_zero;
    return c->hint_offset + c->hint_len - offset;
}

/*
 * A claimed run becomes what one extent of the source holds of it: what is beyond goes back, and of zeroes as much more is
 * claimed as there is in a row.
 */
static void co_fn fit_to_extent(struct copy *c, struct copy_piece *piece)
{
    uint64_t granule = bitmap_granularity(c->work);
    uint64_t end = piece->offset + piece->len;
    uint64_t reach = look_ahead(c, piece->offset, &piece->zero);
    uint64_t more;
    uint64_t len;

    reach = align_up(reach,
                     granule); /* a granule that is of both kinds is looked at when it is pulled */
    if (reach < piece->len) {
        bitmap_set(c->work, piece->offset + reach, piece->len - reach);
        piece->len = reach;
        return;
    }
    if (!piece->zero || reach == piece->len ||
        bitmap_claim(c->work, end, piece->offset + reach - end, &more, &len) <= 0)
        return;
    if (more == end)
        piece->len += len;
    else
        bitmap_set(c->work, more, len);
    c->next = MAX(c->next, piece->offset + piece->len);
}

static uint64_t claim_size(const struct copy *c)
{
    return c->offload ? MAX(c->chunk, COPY_OFFLOAD_CHUNK) : c->chunk;
}

/* C1. The next run, from where the last claim ended, or of what is urgent. 1: claimed. 0: there is none. */
static int co_fn claim(struct copy *c, struct copy_piece *piece)
{
    uint64_t granule = bitmap_granularity(c->work);
    uint64_t offset;
    uint64_t len;
    int r;

    piece->zero = false;
    if (c->policy->urgent && c->policy->urgent(c->arg, &offset, &len)) {
        /* Whole granules: a claim from within one would take its bit for the first part as well. */
        len = align_up(offset + len, granule) - align_down(offset, granule);
        offset = align_down(offset, granule);
        r = bitmap_claim(c->work, offset, MIN(len, c->chunk), &piece->offset, &piece->len);
        if (r < 0 || (r == 1 && piece->offset < offset + len))
            return r;
        if (r == 1) /* it was copied meanwhile, and this is something else */
            bitmap_set(c->work, piece->offset, piece->len);
    }
    r = bitmap_claim(c->work, c->next, claim_size(c), &piece->offset, &piece->len);
    if (r == 0)
        r = bitmap_claim(c->work, 0, claim_size(c), &piece->offset, &piece->len);
    if (r <= 0)
        return r;
    c->next = piece->offset + piece->len;
    fit_to_extent(c, piece);
    /* The last granule may reach beyond the end. */
    piece->len = MIN(piece->len, c->size - piece->offset);
    return 1;
}

static unsigned push_flags(const struct copy *c, const struct copy_piece *piece)
{
    uint64_t end = piece->offset + piece->len;
    uint64_t granule = bitmap_granularity(c->work);

    if (piece->zero)
        return REQUEST_MAY_UNMAP;
    if (!c->compress || !is_aligned(piece->offset, granule) ||
        (!is_aligned(end, granule) && end != c->size))
        return 0;
    return REQUEST_COMPRESSED;
}

static int co_fn push(struct copy *c, const struct copy_piece *piece, struct iobuf *buf)
{
    struct iovec iov = {buf->data, piece->len};
    struct request req = {
        .kind = piece->zero ? REQUEST_WRITE_ZEROES : REQUEST_WRITE,
        .flags = push_flags(c, piece),
        .offset = piece->offset,
        .len = piece->len,
        .iov = piece->zero ? NULL : &iov,
        .iov_count = piece->zero ? 0 : 1,
        .hold = piece->zero ? NULL : buf,
    };

    return backend_co_request(c->target, &req);
}

/* 0: go on with this piece as if done. 1: again. Negative: the copy fails. */
static int co_fn handle_error(struct copy *c, int error, bool is_read)
{
    int r;

    if (error == -ECANCELED)
        return error;
    switch (c->policy->on_error(c->arg, error, is_read)) {
    case COPY_FAIL:
        return error;
    case COPY_SKIP:
        return 0;
    case COPY_RETRY:
        break;
    }
    r = c->policy->co_pause_point(c->arg);
    return r < 0 ? r : 1;
}

/* Gets a first part of a claimed run. 1: it could not be had, and is left out. */
static int co_fn pull(struct copy *c, struct copy_piece *piece, struct iobuf *buf)
{
    const struct copy_piece whole = *piece;

    for (;;) {
        int r = c->policy->co_pull(c->arg, piece, buf);

        if (r >= 0)
            return 0;
        *piece = whole;
        piece->len = MIN(whole.len, c->chunk);
        r = handle_error(c, r, true);
        if (r <= 0)
            return r < 0 ? r : 1;
        *piece = whole;
    }
}

/* Brings it to the target; it stays in the buffer until the target has taken it. 1: it is left out. */
static int co_fn push_surely(struct copy *c, const struct copy_piece *piece, struct iobuf *buf)
{
    for (;;) {
        int r = wait_for_rate(c, piece->zero ? 0 : piece->len);

        if (r == 0)
            r = push(c, piece, buf);
        if (r == 0)
            return 0;
        r = handle_error(c, r, false);
        if (r <= 0)
            return r < 0 ? r : 1;
    }
}

struct offloading {
    struct copy *copy;
    struct copy_piece *piece;
    int result;
};

static void co_fn offload_main(void *arg)
{
    struct offloading *o = arg;

    o->result = o->copy->policy->co_offload(o->copy->arg, o->piece);
}

/* With the bound. */
static int co_fn offload_in_time(struct copy *c, struct copy_piece *piece)
{
    struct offloading o = {.copy = c, .piece = piece, .result = -ENOMEM};
    struct co_scope scope;

    co_scope_init(&scope);
    co_scope_set_deadline(&scope, loop_clock() + OFFLOAD_NS);
    (void)co_scope_start(&scope, offload_main, &o);
    co_scope_join(&scope);
    return o.result;
}

/* Of the piece, or of a first part of it. 1: the host has copied it. 0: it is to be pulled and pushed. */
static int co_fn offload(struct copy *c, struct copy_piece *piece)
{
    const struct copy_piece whole = *piece;
    int r;

    if (!c->offload || piece->zero)
        return 0;
    r = wait_for_rate(c, 0);
    if (r < 0)
        return r;
    r = offload_in_time(c, piece);
    if (r == 0) {
        c->slice_bytes += atomic_get(&c->speed) ? piece->len : 0;
        return 1;
    }
    c->offload &= r == -EOPNOTSUPP;
    *piece = whole;
    return 0;
}

static int co_fn copy_piece(struct copy *c, struct copy_piece *piece, struct iobuf *buf)
{
    int by_host = offload(c, piece);
    int r = by_host ? MIN(by_host, 0) : pull(c, piece, buf);

    if (r == 0 && !by_host)
        r = push_surely(c, piece, buf);
    if (r < 0)
        return r;
    c->policy->co_pushed(c->arg, piece, r == 1);
    return 0;
}

static int co_fn copy_run(struct copy *c, struct copy_piece run, struct iobuf *buf)
{
    int r = 0;

    while (r == 0 && run.len) {
        struct copy_piece piece = run;

        r = copy_piece(c, &piece, buf);
        if (r < 0)
            break;
        run.offset += piece.len;
        run.len -= piece.len;
        if (run.len)
            r = c->policy->co_pause_point(c->arg);
    }
    if (run.len)
        bitmap_set(c->work, run.offset, run.len); /* C1: back */
    return r;
}

static void co_fn work(void *arg)
{
    struct copy *c = arg;
    struct iobuf *buf = iobuf_new(c->chunk);
    struct copy_piece run;
    int r = buf ? 0 : -ENOMEM;

    c->policy->worker(c->arg, true);
    while (r == 0 && !c->result) {
        r = c->policy->co_pause_point(c->arg);
        if (r == 0)
            r = claim(c, &run);
        if (r <= 0)
            break;
        r = copy_run(c, run, buf);
    }
    c->policy->worker(c->arg, false);
    iobuf_unref(buf);
    if (r < 0 && !c->result)
        c->result = r;
}

int copy_co_run(struct copy *c)
{
    uint64_t offset;
    uint64_t len;

    /* Again as long as there is something: a worker may have put a run back, or a writer dirtied it, after the last look. */
    do {
        for (unsigned i = 0; i < c->workers && !c->result; i++) {
            int r = co_scope_start(&c->scope, work, c);

            if (r < 0 && !c->result)
                c->result = r;
        }
        co_scope_join(&c->scope);
    } while (!c->result && bitmap_next_dirty(c->work, 0, c->size, &offset, &len));
    return c->result;
}
