/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A qcow2 image with internal snapshots beside flat arrays of what the disk, and each snapshot of it, holds. On the simulated disk;
 * one coroutine.
 */
#ifndef CAIRN_TESTS_SNAPSHOT_MODEL_H
#define CAIRN_TESTS_SNAPSHOT_MODEL_H

#include "formats/list.h"
#include "formats/qcow2/qcow2-snapshot.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#define MODEL_PATH      "/disk/image"
#define MODEL_BASE      "/disk/base"
#define MODEL_SIZE_MAX  ((uint64_t)192 << 10)
#define MODEL_SNAPSHOTS 5

/* A disk's content. */
struct model_disk {
    uint64_t size;
    uint8_t flat[MODEL_SIZE_MAX]; /* zeroes beyond the size */
};

struct model_snapshot {
    char name[16];
    struct model_disk disk;
};

struct model_state {
    struct model_disk now;
    struct model_snapshot snapshots[MODEL_SNAPSHOTS];
    unsigned count;
    unsigned named; /* names so far */
};

struct snapshot_model {
    struct prng prng;
    struct sim_disk *disk;
    struct qcow2_shape shape;
    struct model_state state;
    struct model_disk *base; /* what lies below; NULL: nothing does */
    struct graph *graph;
    struct backend *backend;
    unsigned refused; /* refcounts have too few bits */
};

static const struct driver *const *const model_drivers[] = {protocol_drivers, format_drivers, NULL};

static inline void model_open(struct snapshot_model *m)
{
    m->graph = graph_new(model_drivers);
    if (m->base)
        add_layer(m->graph, "below", MODEL_BASE, NULL, true);
    add_layer(m->graph, "top", MODEL_PATH, m->base ? "below" : NULL, false);
    m->backend = must_attach(m->graph, "top", ACCESS_RW, "writer");
    check(backend_size(m->backend) == m->state.now.size);
}

static inline void model_close(struct snapshot_model *m)
{
    m->backend = backend_co_free(m->backend);
    m->graph = graph_co_free(m->graph);
}

static inline void model_die(const struct snapshot_model *m, const char *what, uint64_t at,
                             unsigned is, unsigned expected)
{
    fprintf(stderr,
            "%s: version %u, clusters of 2^%u, refcount order %u: byte %" PRIu64 " is %u, not %u\n",
            what, m->shape.version, m->shape.cluster_bits, m->shape.refcount_order, at, is,
            expected);
    abort();
}

static inline void model_compare(const struct snapshot_model *m, const char *what,
                                 const uint8_t *data, const struct model_disk *d)
{
    for (uint64_t i = 0; i < d->size; i++) {
        if (data[i] != d->flat[i])
            model_die(m, what, i, data[i], d->flat[i]);
    }
}

/* As the driver reads it. */
static inline void model_read(struct snapshot_model *m)
{
    uint8_t *data = xalloc(1, MODEL_SIZE_MAX);

    check(backend_size(m->backend) == m->state.now.size);
    check(read_at(m->backend, 0, m->state.now.size, data) == 0);
    model_compare(m, "read", data, &m->state.now);
    free(data);
}

/* As the judge reads a closed image: 0 is the disk, from 1 on its snapshots. Is it that? */
static inline bool model_matches(const struct snapshot_model *m, unsigned number,
                                 const struct model_disk *d)
{
    struct qcow2_layer layers[2] = {{.snapshot = number}};
    uint8_t *data = xalloc(1, MODEL_SIZE_MAX);
    size_t len;
    uint8_t *bytes = image_load(m->disk, MODEL_PATH, &len);
    uint8_t *below = NULL;
    bool same;

    layers[0].file = qcow2_file_in_memory(bytes, len);
    if (m->base) {
        below = image_load(m->disk, MODEL_BASE, &len);
        layers[1].file = qcow2_file_in_memory(below, len);
    }
    same = qcow2_read_guest(layers, m->base ? 2 : 1, 0, data, (size_t)d->size) == 0 &&
           memcmp(data, d->flat, (size_t)d->size) == 0;
    free(bytes);
    free(below);
    free(data);
    return same;
}

/* Is a closed image in this state, by the judge's word? Sizes and names too. */
static inline bool model_is(const struct snapshot_model *m, const struct model_state *s)
{
    struct qcow2_verdict v;
    size_t len;
    uint8_t *bytes = image_load(m->disk, MODEL_PATH, &len);
    struct qcow2_file f = qcow2_file_in_memory(bytes, len);
    bool same =
        qcow2_check(&f, &v) == 0 && v.snapshots == s->count && v.virtual_size == s->now.size;

    for (unsigned i = 0; same && i < s->count; i++) {
        struct qcow2_snapshot_seen seen;

        check(qcow2_see_snapshot(&f, i + 1, &seen) == 0);
        same = strcmp(seen.name, s->snapshots[i].name) == 0 &&
               seen.disk_size == s->snapshots[i].disk.size;
    }
    free(bytes);
    same = same && model_matches(m, 0, &s->now);
    for (unsigned i = 0; same && i < s->count; i++)
        same = model_matches(m, i + 1, &s->snapshots[i].disk);
    return same;
}

/* ---- operations ---- */

static inline void model_write(struct snapshot_model *m, uint64_t at, uint64_t len)
{
    uint8_t *flat = m->state.now.flat + at;
    uint8_t *data = xalloc(1, len);

    for (uint64_t i = 0; i < len; i++)
        data[i] = (uint8_t)prng_next(&m->prng);
    switch (prng_below(&m->prng, 6)) {
    case 0:
        check(send_request(m->backend, REQUEST_WRITE_ZEROES,
                           prng_chance(&m->prng, 500) ? REQUEST_MAY_UNMAP : 0, at, len, NULL) == 0);
        memset(flat, 0, len);
        break;
    case 1: /* as it was, or zeroes */
        check(send_request(m->backend, REQUEST_DISCARD, 0, at, len, NULL) == 0);
        check(read_at(m->backend, at, len, data) == 0);
        for (uint64_t i = 0; i < len; i++) {
            if (data[i] && data[i] != flat[i])
                model_die(m, "discard", at + i, data[i], flat[i]);
        }
        memcpy(flat, data, len);
        break;
    default:
        check(send_request(m->backend, REQUEST_WRITE, 0, at, len, data) == 0);
        memcpy(flat, data, len);
        break;
    }
    free(data);
}

static inline void model_write_somewhere(struct snapshot_model *m)
{
    uint64_t size = m->state.now.size;
    uint64_t at = prng_below(&m->prng, size);
    uint64_t len = 1 + prng_below(&m->prng, prng_chance(&m->prng, 300) ? 20000 : 2000);

    model_write(m, at, MIN(len, size - at));
}

static inline void model_resize(struct snapshot_model *m)
{
    AUTO(error_free) struct error *err = NULL;
    struct model_disk *d = &m->state.now;
    uint64_t size = (1 + prng_below(&m->prng, MODEL_SIZE_MAX / 512)) * 512;

    check(graph_co_resize(m->graph, "top", size, &err) == 0);
    memset(d->flat + size, 0, MODEL_SIZE_MAX - size);
    d->size = size;
}

/* True if it was done; false if the refcounts have too few bits. */
static inline bool model_done(struct snapshot_model *m, int r, struct error *const *err)
{
    if (r == 0)
        return true;
    if (r != -EFBIG || m->shape.refcount_order > 1) {
        fprintf(stderr, "refcount order %u: %s\n", m->shape.refcount_order, error_text(*err));
        abort();
    }
    m->refused++;
    return false;
}

static inline void model_create(struct snapshot_model *m)
{
    AUTO(error_free) struct error *err = NULL;
    struct model_snapshot *s = &m->state.snapshots[m->state.count];
    struct qcow2_snapshot_new how = {.name = s->name, .date_s = 5, .date_ns = 6};

    (void)snprintf(s->name, sizeof(s->name), "s%u", m->state.named++);
    s->disk = m->state.now;
    if (model_done(m, qcow2_co_snapshot_create(m->backend, &how, &err), &err))
        m->state.count++;
}

static inline void model_apply(struct snapshot_model *m, unsigned number)
{
    AUTO(error_free) struct error *err = NULL;
    const struct model_snapshot *s = &m->state.snapshots[number];
    bool vm_state = true;

    if (model_done(m, qcow2_co_snapshot_apply(m->backend, s->name, &vm_state, &err), &err)) {
        m->state.now = s->disk;
        check(!vm_state);
    }
}

static inline void model_delete(struct snapshot_model *m, unsigned number)
{
    AUTO(error_free) struct error *err = NULL;
    struct model_state *s = &m->state;
    int r = qcow2_co_snapshot_delete(m->backend, s->snapshots[number].name, &err);

    if (r < 0) {
        fprintf(stderr, "delete: %s\n", error_text(err));
        abort();
    }
    memmove(&s->snapshots[number], &s->snapshots[number + 1],
            (s->count - number - 1) * sizeof(s->snapshots[0]));
    s->count--;
}

static inline void model_empty(struct snapshot_model *m)
{
    AUTO(error_free) struct error *err = NULL;

    if (qcow2_co_empty(m->backend, &err) < 0) {
        fprintf(stderr, "empty: %s\n", error_text(err));
        abort();
    }
    if (m->base)
        memcpy(m->state.now.flat, m->base->flat, (size_t)m->state.now.size);
    else
        memset(m->state.now.flat, 0, MODEL_SIZE_MAX);
}

enum model_op { MODEL_CREATE, MODEL_APPLY, MODEL_DELETE, MODEL_EMPTY, MODEL_OPS };

/* One of these that is possible. */
static inline void model_operate(struct snapshot_model *m, enum model_op op)
{
    if (m->state.count == 0 && op != MODEL_EMPTY)
        op = MODEL_CREATE;
    if (op == MODEL_CREATE && m->state.count == MODEL_SNAPSHOTS)
        op = MODEL_DELETE;
    if (op == MODEL_CREATE)
        model_create(m);
    else if (op == MODEL_APPLY)
        model_apply(m, (unsigned)prng_below(&m->prng, m->state.count));
    else if (op == MODEL_EMPTY)
        model_empty(m);
    else
        model_delete(m, (unsigned)prng_below(&m->prng, m->state.count));
}

/* An empty image of some shape. */
static inline void model_begin(struct snapshot_model *m, uint64_t seed)
{
    *m = (struct snapshot_model){.prng = {seed}, .disk = sim_disk_new()};
    m->state.now.size = (1 + prng_below(&m->prng, MODEL_SIZE_MAX / 512)) * 512;
    qcow2_shape_random(&m->shape, &m->prng, m->state.now.size);
    image_make(m->disk, MODEL_PATH, &m->shape);
}

/* The files of a model once more, on a disk of its own; `bytes` is the image. */
static inline void model_put(struct snapshot_model *m, const uint8_t *bytes, size_t len)
{
    m->disk = sim_disk_new();
    image_put(m->disk, MODEL_PATH, bytes, len);
    if (m->base) {
        struct qcow2_shape shape = {
            .version = 3, .cluster_bits = 12, .refcount_order = 4, .size = m->base->size};
        size_t base_len;
        uint8_t *base;

        shape.allocated = div_up(shape.size, 4096);
        base = qcow2_make(&shape, &base_len);
        memcpy(base + base_len - shape.allocated * 4096, m->base->flat, (size_t)shape.size);
        image_put(m->disk, MODEL_BASE, base, base_len);
        free(base);
    }
}

/* An empty image of a shape, over a base of the same size that is full, or over nothing. */
static inline void model_begin_with(struct snapshot_model *m, struct model_disk *base)
{
    size_t len;
    uint8_t *bytes;

    sim_disk_free(m->disk);
    m->base = base;
    if (base) {
        *base = (struct model_disk){.size = m->state.now.size};
        for (uint64_t i = 0; i < base->size; i++)
            base->flat[i] = (uint8_t)(prng_next(&m->prng) | 1);
        m->state.now = *base;
        m->shape.backing = "base";
    }
    bytes = qcow2_make(&m->shape, &len);
    model_put(m, bytes, len);
    free(bytes);
}

#endif
