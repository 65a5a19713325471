/* SPDX-License-Identifier: Apache-2.0 */
/* Workers, each of which takes the next piece, reads it, waits for its turn if the order matters, and writes what is not zero. */
#include "cli/image/image-copy.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/macros.h"
#include "base/zeroes.h"
#include "graph/offload.h"
#include "loop/iobuf.h"
#include "loop/loop.h"
#include "loop/scope.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define CHUNK  ((uint64_t)256 << 10)
#define SECTOR 512

/* By the host: as much as a qcow2 target allocates in one step, and worth a thread. */
#define OFFLOAD_CHUNK ((uint64_t)2 << 20)

/* How often a wait looks for signals. */
#define LOOK_NS (100 * NS_PER_MS)

enum piece_kind { PIECE_DATA, PIECE_ZERO, PIECE_LEFT };

struct piece {
    enum piece_kind kind;
    const struct image_copy_source *source;
    struct backend *backend; /* where data is read from */
    uint64_t at;             /* in the target */
    uint64_t len;
    uint64_t number;
};

/* The first error is the one to tell. Takes it. */
static int stop(struct image_copy *c, int r, struct error **err)
{
    int nothing = 0;

    if (atomic_cas(&c->result, &nothing, r))
        error_move(&c->error, err);
    else
        error_free(err);
    return r;
}

static int fail(struct image_copy *c, int r, const char *what, uint64_t at)
{
    struct error *err = NULL;

    (void)error_set(&err, -r, "error while %s at byte %" PRIu64 ": %s", what, at, strerror(-r));
    return stop(c, r, &err);
}

/* ---- what is to be done next ---- */

static enum piece_kind kind_of(const struct image_copy *c, const struct extent *e)
{
    if (c->only_own && !(e->flags & EXTENT_ALLOCATED))
        return PIECE_LEFT;
    return e->flags & EXTENT_ZERO ? PIECE_ZERO : PIECE_DATA;
}

/* Of the first layer that holds what is at c->at. Beyond the end of one there is nothing, whatever lies below it. */
static int co_fn take_from_layers(struct image_copy *c, struct piece *piece)
{
    *piece = (struct piece){
        .kind = PIECE_LEFT, .source = c->sources, .at = c->at, .len = c->size - c->at};
    for (unsigned i = 0; i < c->layer_count; i++) {
        struct extent_walk *w = &c->layers[i];
        uint64_t size = backend_size(w->backend);
        struct extent e;
        int r;

        if (c->at >= size) {
            piece->kind = PIECE_ZERO;
            return 0;
        }
        r = extent_walk_at(w, c->at, MIN(piece->len, size - c->at), &e);
        if (r < 0)
            return fail(c, r, "reading block status", c->at);
        piece->len = e.len;
        if (e.flags & EXTENT_ALLOCATED) {
            piece->kind = e.flags & EXTENT_ZERO ? PIECE_ZERO : PIECE_DATA;
            piece->backend = w->backend;
            return 0;
        }
    }
    return 0;
}

/* Of the source's extent at c->at; the rest of the last sector beyond its end is zeroes. */
static int co_fn take_from(struct image_copy *c, const struct image_copy_source *s,
                           struct piece *piece)
{
    uint64_t offset = c->at - s->begin;
    struct extent e;
    int r;

    *piece = (struct piece){
        .kind = PIECE_ZERO,
        .source = s,
        .backend = s->backend,
        .at = c->at,
        .len = s->size - offset,
    };
    if (s->from + offset >= backend_size(s->backend))
        return 0;
    if (s->is_full) { /* a host may walk the whole file to find that there is no hole */
        piece->kind = PIECE_DATA;
        piece->len = MIN(piece->len, backend_size(s->backend) - s->from - offset);
        return 0;
    }
    c->walk.backend = s->backend;
    r = extent_walk_at(&c->walk, s->from + offset, s->size - offset, &e);
    if (r < 0 && !c->salvage)
        return fail(c, r, "reading block status", c->at);
    piece->kind = r < 0 ? PIECE_DATA : kind_of(c, &e);
    piece->len = r < 0 ? MIN(CHUNK, piece->len) : e.len;
    return 0;
}

/* What is compressed is read, and written, in whole units of the target; sources may change kind within one. */
static void fit_to_units(const struct image_copy *c, struct piece *piece)
{
    uint64_t left = c->size - piece->at;

    if (piece->kind != PIECE_DATA && piece->len < left)
        piece->len = align_down(piece->len, c->unit);
    if (piece->kind != PIECE_DATA && piece->len)
        return;
    piece->kind = PIECE_DATA;
    piece->len = MIN(align_up(MAX(piece->len, (uint64_t)1), c->unit), left);
}

/* Data is copied in pieces of at most so much. */
static uint64_t chunk_of(const struct image_copy *c)
{
    uint64_t chunk = MAX(CHUNK, align_up(c->sparse, CHUNK));

    if (atomic_get(&c->offload))
        return OFFLOAD_CHUNK;
    return c->compress ? MAX(chunk, align_up(c->unit, CHUNK)) : chunk;
}

/* Under c->claim. 1: a piece; 0: nothing is left. */
static int co_fn claim_locked(struct image_copy *c, struct piece *piece)
{
    const struct image_copy_source *s = &c->sources[c->source];
    uint64_t chunk = chunk_of(c);
    int r;

    while (c->at >= s->begin + s->size) {
        if (++c->source >= c->source_count) {
            c->source = c->source_count - 1;
            return 0;
        }
        s++;
        c->walk.list.count = 0;
    }
    r = c->layers ? take_from_layers(c, piece) : take_from(c, s, piece);
    if (r < 0)
        return r;
    if (piece->kind == PIECE_ZERO && !c->sparse)
        piece->kind = PIECE_DATA; /* it is read as what it is */
    if (c->compress)
        fit_to_units(c, piece);
    if (piece->kind == PIECE_DATA)
        piece->len = MIN(align_down(piece->at, chunk) + chunk - piece->at, piece->len);
    piece->number = c->begun++;
    c->at += piece->len;
    return 1;
}

static int co_fn claim(struct image_copy *c, struct piece *piece)
{
    int r;

    co_mutex_lock(&c->claim);
    r = atomic_get(&c->result);
    if (r == 0)
        r = claim_locked(c, piece);
    co_mutex_unlock(&c->claim);
    return r;
}

/* ---- doing it ---- */

static int co_fn read_sectors(const struct piece *p, uint8_t *data, struct iobuf *buf)
{
    for (uint64_t done = 0; done < p->len; done += SECTOR) {
        size_t len = (size_t)MIN(p->len - done, (uint64_t)SECTOR);
        int r = image_co_read(p->backend, p->source->from + p->at - p->source->begin + done,
                              data + done, len, buf);

        if (r == -ECANCELED)
            return r;
        if (r < 0) {
            cli_warn("error while reading at byte %" PRIu64 ": %s, leaving zeroes", p->at + done,
                     strerror(-r));
            memset(data + done, 0, len);
        }
    }
    return 0;
}

/* What lies in one source. */
static int co_fn read_part(struct image_copy *c, const struct piece *p, uint8_t *data,
                           struct iobuf *buf)
{
    int r = image_co_read(p->backend, p->source->from + p->at - p->source->begin, data,
                          (size_t)p->len, buf);

    if (r < 0 && r != -ECANCELED && c->salvage)
        r = read_sectors(p, data, buf);
    return r < 0 ? fail(c, r, "reading", p->at) : 0;
}

/* A unit that is compressed may have its parts in several sources. */
static int co_fn read_piece(struct image_copy *c, const struct piece *p, struct iobuf *buf)
{
    struct piece part = *p;
    uint64_t end = p->at + p->len;
    int r = 0;

    while (r == 0 && part.at < end) {
        uint64_t source_end = part.source->begin + part.source->size;

        if (part.at == source_end) {
            part.source++;
            part.backend = part.source->backend;
            continue;
        }
        part.len = MIN(end, source_end) - part.at;
        r = read_part(c, &part, buf->data + (part.at - p->at), buf);
        part.at += part.len;
    }
    return r;
}

static int co_fn write_run(struct image_copy *c, uint64_t at, struct iobuf *buf, size_t from,
                           size_t len, bool zero)
{
    unsigned flags = c->writethrough ? REQUEST_FUA : 0;
    int r = 0;

    if (!zero)
        r = image_co_write(c->target, at, buf->data + from, len,
                           flags | (c->compress ? REQUEST_COMPRESSED : 0), buf);
    else if (!c->target_zero)
        r = image_co_zero(c->target, at, len, flags | REQUEST_MAY_UNMAP);
    return r < 0 ? fail(c, r, "writing", at) : 0;
}

/* The end of the unit that byte `from` of the piece is in, counted from the piece's begin. */
static size_t unit_end(const struct piece *p, size_t from, uint64_t unit)
{
    return (size_t)MIN(align_down(p->at + from, unit) + unit - p->at, p->len);
}

/* Data is written in runs as long as there are; zeroes are told by whole units. */
static int co_fn write_data(struct image_copy *c, const struct piece *p, struct iobuf *buf)
{
    uint64_t unit = MAX(c->sparse, c->unit);
    size_t from = 0;
    int r = 0;

    if (!c->sparse)
        return write_run(c, p->at, buf, 0, (size_t)p->len, false);
    while (r == 0 && from < p->len) {
        size_t to = unit_end(p, from, unit);
        bool zero = is_all_zeroes(buf->data + from, to - from);

        while (to < p->len) {
            size_t next = unit_end(p, to, unit);

            if (is_all_zeroes(buf->data + to, next - to) != zero)
                break;
            to = next;
        }
        r = write_run(c, p->at + from, buf, from, to - from, zero);
        from = to;
    }
    return r;
}

static int co_fn wait_for_turn(struct image_copy *c, const struct piece *p)
{
    int r = 0;

    while (r == 0 && c->in_order) {
        tiny_lock_acquire(&c->lock);
        if (c->ended == p->number || atomic_get(&c->result)) {
            tiny_lock_release(&c->lock);
            break;
        }
        r = wait_queue_wait(&c->turn, &c->lock, LOOP_FOREVER); /* lets go of the lock */
    }
    return r < 0 ? r : atomic_get(&c->result);
}

static void end_turn(struct image_copy *c)
{
    tiny_lock_acquire(&c->lock);
    c->ended++;
    wait_queue_wake_all(&c->turn);
    tiny_lock_release(&c->lock);
}

/* So that no more than the rate goes out on average. A signal is minded meanwhile. */
static int co_fn keep_rate(struct image_copy *c, uint64_t bytes)
{
    uint64_t until;
    int r = 0;

    uint64_t done = atomic_add(&c->data_done, bytes) + bytes;

    if (!c->rate)
        return 0;
    until = c->started_ns + (uint64_t)((double)done / (double)c->rate * (double)NS_PER_S);
    while (r == 0 && atomic_get(&c->result) == 0 && !cli_interrupted() && loop_clock() < until)
        r = co_sleep_until(MIN(until, loop_clock() + LOOK_NS));
    return r;
}

/* If it does not, for whatever reason, reading and writing will do, or will tell why not. */
static bool co_fn host_copies(struct image_copy *c, const struct piece *p)
{
    int r = backend_co_copy(p->backend, p->source->from + p->at - p->source->begin, c->target,
                            p->at, p->len, c->writethrough ? REQUEST_FUA : 0);

    if (r == -EXDEV)
        atomic_set(&c->offload, 0u);
    return r == 0;
}

static int co_fn copy_piece(struct image_copy *c, const struct piece *p, struct iobuf *buf)
{
    bool copied = false;
    int r = 0;

    if (p->kind == PIECE_DATA && atomic_get(&c->offload)) {
        r = wait_for_turn(c, p);
        copied = r == 0 && host_copies(c, p);
    }
    if (r == 0 && p->kind == PIECE_DATA && !copied)
        r = read_piece(c, p, buf);
    if (r == 0)
        r = wait_for_turn(c, p);
    if (r == 0 && p->kind == PIECE_DATA && !copied)
        r = write_data(c, p, buf);
    else if (r == 0 && p->kind == PIECE_ZERO && !c->target_zero)
        r = write_run(c, p->at, buf, 0, (size_t)p->len, true);
    end_turn(c);
    if (r == 0 && p->kind == PIECE_DATA)
        r = keep_rate(c, p->len);
    return r;
}

/*
 * The workers on one loop. One is enough where everything is answered at once, as on tmpfs: with more of them, each with a buffer of
 * its own, the data would leave the processor's cache between its reading and its writing. So another one begins whenever a piece had
 * to wait for the host, or for a thread that computes.
 */
struct crew {
    struct image_copy *copy;
    struct co_scope scope;
    unsigned left;   /* may begin yet */
    uint64_t waited; /* what the loop's counter of such waits said when the last one began */
};

static void co_fn work(void *arg);

/* A worker runs until it waits for the first time. */
static void co_fn begin_more(struct crew *crew)
{
    const struct loop_counters *counters = loop_counters(loop_self());

    while (crew->left && counters->engine_ops != crew->waited) {
        int r;

        crew->left--;
        crew->waited = counters->engine_ops;
        r = co_scope_start(&crew->scope, work, crew);
        if (r < 0)
            (void)fail(crew->copy, r, "starting", 0);
    }
}

void co_fn work(void *arg)
{
    struct crew *crew = arg;
    struct image_copy *c = crew->copy;
    struct iobuf *buf = iobuf_new((size_t)chunk_of(c));
    struct error *err = NULL;
    int r = buf ? 0 : stop(c, error_set(&err, ENOMEM, "no memory"), &err);

    while (r == 0) {
        struct piece piece = {.source = c->sources};

        if (cli_interrupted()) {
            (void)stop(c, cli_interrupted_error(&err), &err);
            break;
        }
        r = claim(c, &piece);
        if (r <= 0)
            break;
        r = copy_piece(c, &piece, buf);
        (void)atomic_add(&c->progress->done, piece.len);
        begin_more(crew);
    }
    iobuf_unref(buf);
    if (r < 0)
        (void)stop(c, error_set(&err, -r, "%s", strerror(-r)), &err);
}

static void co_fn run_workers(struct image_copy *c, unsigned count)
{
    struct crew crew = {.copy = c, .left = count};

    crew.waited = loop_counters(loop_self())->engine_ops - 1; /* the first one begins */
    co_scope_init(&crew.scope);
    begin_more(&crew);
    co_scope_join(&crew.scope);
}

static void co_fn work_beside(void *arg)
{
    struct image_copy *c = arg;
    int r = backend_attach(c->target);

    for (size_t i = 0; r == 0 && i < c->source_count; i++)
        r = backend_attach(c->sources[i].backend);
    for (unsigned i = 0; r == 0 && i < c->layer_count; i++)
        r = backend_attach(c->layers[i].backend);
    if (r < 0)
        (void)fail(c, r, "starting", 0);
    else
        run_workers(c, c->workers / 2);
}

static void co_fn call_beside(void *arg)
{
    struct image_copy *c = arg;
    int r = loop_co_call(c->beside, work_beside, c);

    if (r < 0)
        (void)fail(c, r, "starting", 0);
}

int image_co_copy(struct image_copy *c, struct error **err)
{
    struct co_scope scope;

    c->started_ns = loop_clock();
    co_mutex_init(&c->claim);
    wait_queue_init(&c->turn);
    co_scope_init(&scope);
    if (!c->beside || c->workers < 2 || co_scope_start(&scope, call_beside, c) < 0)
        run_workers(c, c->workers);
    else
        run_workers(c, c->workers - c->workers / 2);
    co_scope_join(&scope);
    if (c->result < 0) {
        error_move(err, &c->error);
        return error_wrap(err, c->result, "'%s' is written in part only", c->target_name);
    }
    return 0;
}
