/* SPDX-License-Identifier: Apache-2.0 */
/* Points in time: saving what is about to be overwritten, and reading the point. The design is in the header. */
#include "copy/point.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/log.h"
#include "base/macros.h"
#include "copy/saved.h"
#include "graph/offload.h"
#include "graph/overlap.h"
#include "loop/co.h"
#include "loop/file.h"
#include "loop/scope.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* How much of a big write is saved at once. */
#define SAVE_STEP ((uint64_t)1 << 20)

struct point {
    /* Constant. */
    struct point_options options;
    struct file *scratch; /* or NULL */

    struct bitmap *uncaught; /* POINT-1 */
    struct overlap overlap;
    struct saved saved;
    uint32_t broken; /* atomic: 0 or a positive errno */
};

static int co_fn control_fn open_scratch(struct point *p, struct error **err)
{
    AUTO(free_ptr) char *path = NULL;
    uint64_t name;
    int r;

    loop_random(&name, sizeof(name));
    path = xasprintf("%s/cairn-scratch-%016" PRIx64, p->options.scratch_dir, name);
    r = file_co_open(&p->scratch, path, FILE_READ | FILE_WRITE | FILE_CREATE | FILE_EXCLUSIVE, 0600,
                     err);
    if (r < 0)
        return error_wrap(err, r, "scratch file");
    r = file_co_unlink(path);
    return r < 0 ? error_set(err, -r, "cannot unlink scratch file '%s': %s", path, strerror(-r))
                 : 0;
}

int point_co_new(struct point **ret, const struct point_options *o, struct error **err)
{
    struct point *p = try_new(struct point);
    int r = 0;

    if (!p)
        return error_set(err, ENOMEM, "no memory for a point in time");
    p->options = *o;
    overlap_init(&p->overlap);
    saved_init(&p->saved);
    p->uncaught = bitmap_new(o->size, POINT_BLOCK);
    if (!p->uncaught)
        r = error_set(err, ENOMEM, "no memory for a point in time");
    if (r == 0 && o->scratch_dir)
        r = open_scratch(p, err);
    if (r < 0) {
        (void)point_co_free(p);
        return r;
    }
    *ret = p;
    return 0;
}

static void co_fn close_main(void *arg)
{
    (void)file_co_close(arg); /* nobody reads it any more */
}

/* P4: past the bound it closes when the host likes. */
static void co_fn close_scratch(struct point *p)
{
    struct co_scope scope;

    co_scope_init(&scope);
    co_scope_set_deadline(&scope, loop_clock() + p->options.close_ns);
    if (co_scope_start(&scope, close_main, p->scratch) < 0)
        (void)file_unref(p->scratch); /* no memory: it is closed here and now */
    co_scope_join(&scope);
}

struct point *point_co_free(struct point *p)
{
    if (!p)
        return NULL;
    if (p->scratch)
        close_scratch(p);
    saved_release(&p->saved);
    bitmap_free(p->uncaught);
    free(p);
    return NULL;
}

struct bitmap *point_uncaught(struct point *p)
{
    return p->uncaught;
}

int point_broken(const struct point *p)
{
    return -(int)atomic_get(&p->broken);
}

void point_break(struct point *p, int error)
{
    uint32_t whole = 0;

    (void)atomic_cas(&p->broken, &whole, (uint32_t)-error); /* the first reason stays */
}

/* The range is held exclusively: nobody else clears or looks. */
static int caught(struct point *p, uint64_t offset, uint64_t len)
{
    uint64_t o;
    uint64_t l;

    while (bitmap_next_dirty(p->uncaught, offset, offset + len, &o, &l)) {
        uint64_t got_o;
        uint64_t got_l;
        int r = bitmap_claim(p->uncaught, o, l, &got_o, &got_l);

        if (r < 0)
            return r;
    }
    return 0;
}

/* To the scratch file, as much of it as there is room for in one piece. */
static int co_fn spill(struct point *p, struct saved_run *run, struct iobuf *b, uint8_t *data)
{
    struct iovec iov = {.iov_base = data};
    int r = p->scratch ? saved_take_scratch(&p->saved, run, p->options.scratch_max_bytes) : -ENOSPC;

    if (r < 0)
        return r;
    iov.iov_len = run->len;
    return file_co_write(p->scratch, run->scratch_offset, &iov, 1, false, b);
}

/* What lies within one region, or a first part of it: to memory while that has room. */
static int co_fn store_run(struct point *p, uint64_t offset, uint64_t len, struct iobuf *b,
                           uint8_t *data, uint64_t *ret_len)
{
    struct saved_run *run = saved_run_new(offset, len);
    int r = 0;

    if (!run)
        return -ENOMEM;
    if (saved_take_memory(&p->saved, run, p->options.ram_bytes))
        memcpy(run->data, data, len);
    else
        r = spill(p, run, b, data);
    if (r < 0) {
        free(run); /* its scratch space stays out of use (SAVED-1) */
        return r;
    }
    *ret_len = run->len;
    saved_insert(&p->saved, run);
    return 0;
}

static int co_fn store(struct point *p, uint64_t offset, uint64_t len, struct iobuf *b)
{
    uint64_t done = 0;
    int r = 0;

    while (r == 0 && done < len) {
        uint64_t at = offset + done;
        uint64_t step = MIN(len - done, align_down(at, SAVED_REGION) + SAVED_REGION - at);

        r = store_run(p, at, step, b, b->data + done, &step);
        done += step;
    }
    return r;
}

/* Reads a run of blocks that only the source holds, stores it, and says so. */
static int co_fn save_run(struct point *p, struct edge *source, const struct request *for_req,
                          uint64_t offset, uint64_t len)
{
    struct request req = request_for(for_req, REQUEST_READ, offset, len);
    struct iobuf *b = iobuf_new((size_t)len);
    struct iovec iov;
    int r;

    if (!b)
        return -ENOMEM;
    iov = (struct iovec){b->data, (size_t)len};
    req.iov = &iov;
    req.iov_count = 1;
    req.hold = b;
    r = edge_co_request(source, &req);
    if (r == 0 && p->options.through) {
        req.kind = REQUEST_WRITE;
        r = backend_co_request(p->options.through, &req); /* with the guest's pass (G1) */
    } else if (r == 0) {
        r = store(p, offset, len, b);
    }
    if (r == 0)
        r = caught(p, offset, len);
    iobuf_unref(b);
    return r;
}

struct save {
    struct point *point;
    struct edge *source;
    const struct request *req;
    uint64_t first;
    uint64_t last;
    int result;
};

static void co_fn save_main(void *arg)
{
    struct save *s = arg;
    struct point *p = s->point;
    struct overlap_range range;
    uint64_t offset;
    uint64_t len;

    s->result = overlap_begin(&p->overlap, &range, s->first, s->last - s->first, true);
    if (s->result < 0)
        return;
    while (s->result == 0 && bitmap_next_dirty(p->uncaught, s->first, s->last, &offset, &len)) {
        len = MIN(len, SAVE_STEP);
        len = MIN(len, p->options.size - offset);
        s->result = save_run(p, s->source, s->req, offset, len);
    }
    overlap_end(&p->overlap, &range);
}

/* Bounded in time (POINT-3): past the bound its waits end, and what the kernel still reads goes to nobody. */
static int co_fn save_in_time(struct save *s)
{
    const struct point_options *o = &s->point->options;
    uint64_t bound = o->policy == POINT_GUEST_FIRST ? o->latency_bound_ns : o->timeout_ns;
    struct co_scope scope;
    int r;

    co_scope_init(&scope);
    co_scope_set_deadline(&scope, loop_clock() + bound);
    r = co_scope_start(&scope, save_main, s);
    co_scope_join(&scope);
    return r < 0 ? r : s->result;
}

int point_co_save(struct point *p, struct edge *source, struct request *req)
{
    struct save s = {
        .point = p,
        .source = source,
        .req = req,
        .first = align_down(req->offset, POINT_BLOCK),
        .last = MIN(align_up(req->offset + req->len, POINT_BLOCK), p->options.size),
    };
    uint64_t offset;
    uint64_t len;
    int r;

    if (!bitmap_next_dirty(p->uncaught, s.first, s.last, &offset, &len) || point_broken(p))
        return 0;
    r = save_in_time(&s);
    if (r == -ERESTART || (r == -ECANCELED && co_cancelled()))
        return r;
    if (r < 0)
        point_break(p, r);
    return 0;
}

/* 1: a first part of an uncaught run reads as zeroes, and is caught. 0: it is data, as long as piece->len says. */
static int co_fn catch_zeroes(struct point *p, struct backend *source, struct pass *pass,
                              struct copy_piece *piece)
{
    struct extent v[1];
    struct extents extents = {.v = v, .max = 1};
    struct request ask = {
        .kind = REQUEST_EXTENTS,
        .offset = piece->offset,
        .len = piece->len,
        .extents = &extents,
        .pass = pass,
    };
    int r = backend_co_request(source, &ask);

    if (r < 0 || !extents.count)
        return 0; /* then it is read: data is always true */
    if (!(v[0].flags & EXTENT_ZERO)) {
        piece->len = MIN(piece->len, align_up(v[0].len, POINT_BLOCK));
        return 0;
    }
    if (v[0].len < POINT_BLOCK && v[0].len < piece->len)
        return 0; /* a block that is zero in part is data */
    if (v[0].len < piece->len)
        piece->len = align_down(v[0].len, POINT_BLOCK);
    piece->zero = true;
    r = caught(p, piece->offset, piece->len);
    return r < 0 ? r : 1;
}

/* A first part of an uncaught run, as zeroes or in the buffer. The range is held. */
static int co_fn catch_piece(struct point *p, struct backend *source, struct pass *pass,
                             bool maybe_zero, struct copy_piece *piece, struct iobuf *buf)
{
    struct iovec iov;
    struct request read = {
        .kind = REQUEST_READ,
        .offset = piece->offset,
        .iov = &iov,
        .iov_count = 1,
        .hold = buf,
        .pass = pass,
    };
    int r = maybe_zero ? catch_zeroes(p, source, pass, piece) : 0;

    if (r != 0)
        return MIN(r, 0);
    piece->len = MIN(piece->len, (uint64_t)buf->size);
    iov = (struct iovec){buf->data, (size_t)piece->len};
    read.len = piece->len;
    r = backend_co_request(source, &read);
    return r < 0 ? r : caught(p, piece->offset, piece->len);
}

static int co_fn read_saved(struct point *p, struct copy_piece *piece, struct iobuf *buf)
{
    struct saved_run *run = saved_get(&p->saved, piece->offset);
    uint64_t skip;
    struct iovec iov;
    int64_t n;

    if (!run)
        return -EIO;
    skip = piece->offset - run->offset;
    piece->len = MIN(piece->len, run->len - skip);
    piece->len = MIN(piece->len, (uint64_t)buf->size);
    n = (int64_t)piece->len;
    if (run->data) {
        memcpy(buf->data, run->data + skip, (size_t)piece->len);
    } else {
        iov = (struct iovec){buf->data, (size_t)piece->len};
        n = file_co_read(p->scratch, run->scratch_offset + skip, &iov, 1, buf);
    }
    saved_put(&p->saved, run);
    return n < 0 ? (int)n : n < (int64_t)piece->len ? -EIO : 0;
}

/* With the gate passed and the range held: the source's part of a piece. 1: there is none, it has been saved. */
static int co_fn pull_from_source(struct point *p, struct backend *source, struct pass *pass,
                                  bool maybe_zero, struct copy_piece *piece, struct iobuf *buf)
{
    struct overlap_range range;
    uint64_t offset;
    uint64_t len;
    int r = overlap_begin(&p->overlap, &range, piece->offset, piece->len, true);

    if (r < 0)
        return r;
    if (!bitmap_next_dirty(p->uncaught, piece->offset, piece->offset + piece->len, &offset, &len)) {
        r = 1;
    } else if (offset > piece->offset) {
        piece->len = offset - piece->offset;
        r = 1;
    } else {
        piece->len = MIN(len, piece->len);
        r = catch_piece(p, source, pass, maybe_zero, piece, buf);
    }
    overlap_end(&p->overlap, &range);
    return r;
}

int point_co_pull(struct point *p, struct backend *source, struct copy_piece *piece,
                  struct iobuf *buf)
{
    bool maybe_zero = piece->zero;
    struct pass pass;
    int r;

    piece->zero = false;
    /* The gate first: who waits there with the range in hand would keep a drain waiting for a guest that waits for it. */
    do {
        r = backend_co_enter(source, &pass);
        if (r < 0)
            return r;
        r = pull_from_source(p, source, &pass, maybe_zero, piece, buf);
        backend_leave(source, &pass);
    } while (r == -ERESTART);
    if (r == 1)
        r = read_saved(p, piece, buf);
    if (r == 0 && point_broken(p))
        return -ESTALE; /* a guest may have overtaken us: what was read may be new */
    return r;
}

/* As far as blocks from the first on are uncaught: their length. */
static uint64_t uncaught_from(const struct point *p, uint64_t offset, uint64_t len)
{
    uint64_t first;
    uint64_t found;

    if (!bitmap_next_dirty(p->uncaught, offset, offset + len, &first, &found) || first > offset)
        return 0;
    return MIN(found, len);
}

int point_co_offload(struct point *p, struct backend *source, struct backend *target,
                     struct copy_piece *piece)
{
    struct overlap_range range;
    int r;

    piece->len = uncaught_from(p, piece->offset, piece->len);
    if (!piece->len)
        return -EOPNOTSUPP;
    r = backend_co_copy(source, piece->offset, target, piece->offset, piece->len, 0);
    if (r == 0)
        r = overlap_begin(&p->overlap, &range, piece->offset, piece->len, true);
    if (r < 0)
        return r;
    /* POINT-4. Who breaks the point says so before he lets guests go on. */
    if (uncaught_from(p, piece->offset, piece->len) < piece->len || point_broken(p))
        r = -EOPNOTSUPP;
    else
        (void)caught(p, piece->offset, piece->len); /* without memory more is saved than need be */
    overlap_end(&p->overlap, &range);
    return r;
}

void point_co_leave_out(struct point *p, uint64_t offset, uint64_t len)
{
    struct overlap_range range;

    if (overlap_begin(&p->overlap, &range, offset, len, true) == 0) {
        (void)caught(p, offset, len); /* without memory more is saved than need be */
        overlap_end(&p->overlap, &range);
    }
    saved_forget(&p->saved, offset, len);
}

void point_release(struct point *p, uint64_t offset, uint64_t len)
{
    saved_forget(&p->saved, offset, len);
}

bool point_urgent(struct point *p, uint64_t *ret_offset, uint64_t *ret_len)
{
    return saved_oldest(&p->saved, p->options.ram_bytes / 2, p->options.scratch_max_bytes / 2,
                        ret_offset, ret_len);
}
