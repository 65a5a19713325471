/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For tests of the qcow2 driver: images that no code of the driver has made, on the simulated disk or on a real one, chains of
 * nodes over them, and the judge's word on what became of them.
 */
#ifndef CAIRN_TESTS_QCOW2_FIXTURE_H
#define CAIRN_TESTS_QCOW2_FIXTURE_H

#include "base/prng.h"
#include "check.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "qcow2-check.h"
#include "qcow2-make.h"
#include "raw-options.h"
#include "sim-run.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

/* ---- images ---- */

/* Small clusters are likely: tables grow there. */
static inline void qcow2_shape_random(struct qcow2_shape *s, struct prng *prng, uint64_t size)
{
    static const unsigned bits[] = {9, 9, 9, 10, 11, 12, 14, 16};

    *s = (struct qcow2_shape){
        .version = prng_chance(prng, 300) ? 2 : 3,
        .cluster_bits = bits[prng_below(prng, ARRAY_SIZE(bits))],
        .refcount_order = 4,
        .size = size,
    };
    if (s->version == 3 && prng_chance(prng, 600))
        s->refcount_order = (unsigned)prng_below(prng, 7);
    if (s->version == 3 && prng_chance(prng, 250)) {
        s->extended = true;
        s->cluster_bits = MAX(s->cluster_bits, 14u);
    }
}

/* Or with an external data file, of this name beside it; not every image can have one. */
static inline void qcow2_shape_data_file(struct qcow2_shape *s, struct prng *prng, const char *name,
                                         unsigned per_mille)
{
    if (s->version < 3 || !prng_chance(prng, per_mille))
        return;
    s->data_file = name;
    s->data_raw = !s->backing && prng_chance(prng, 500);
}

/* ---- where they lie ---- */

/* `disk` NULL: on a real file system. */
static inline void image_put(struct sim_disk *disk, const char *path, const void *bytes, size_t len)
{
    int fd;

    if (disk) {
        struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR};

        sim_disk_make(disk, path, &setup);
        sim_disk_write(disk, path, 0, bytes, len);
        return;
    }
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    check(fd >= 0 && pwrite(fd, bytes, len, 0) == (ssize_t)len && close(fd) == 0);
}

/* A file beside another one. */
static inline void image_beside(char ret[1200], const char *path, const char *name)
{
    const char *slash = strrchr(path, '/');

    (void)snprintf(ret, 1200, "%.*s%s", slash ? (int)(slash + 1 - path) : 0, path, name);
}

static inline void image_make(struct sim_disk *disk, const char *path, const struct qcow2_shape *s)
{
    char data[1200];
    size_t len;
    uint8_t *bytes = qcow2_make(s, &len);

    image_put(disk, path, bytes, len);
    free(bytes);
    if (s->data_file) { /* of what is not mapped in it nothing is known, but for raw data */
        bytes = xalloc(s->size + 1, 1);
        if (!s->data_raw && !s->allocated)
            memset(bytes, 0xee, s->size);
        image_beside(data, path, s->data_file);
        image_put(disk, data, bytes, s->size);
        free(bytes);
    }
}

/* All of a file; the caller's to free. */
static inline uint8_t *image_load(struct sim_disk *disk, const char *path, size_t *ret_len)
{
    uint8_t *bytes;
    int fd;

    if (disk) {
        int64_t size = sim_disk_size(disk, path);

        check(size >= 0);
        *ret_len = (size_t)size;
        bytes = xalloc(1, *ret_len + 1);
        check(sim_disk_read(disk, path, 0, bytes, *ret_len) >= 0);
        return bytes;
    }
    fd = open(path, O_RDONLY);
    check(fd >= 0);
    *ret_len = (size_t)lseek(fd, 0, SEEK_END);
    bytes = xalloc(1, *ret_len + 1);
    check(pread(fd, bytes, *ret_len, 0) == (ssize_t)*ret_len && close(fd) == 0);
    return bytes;
}

/* The last: and COPIED flags that are not set where they might be. */
enum leaks { NO_LEAKS, LEAKS_ALLOWED, LEAKS_AND_COPIES_ALLOWED };

/*
 * Some of the states that power cuts leave, for other judges: with CAIRN_CRASH_SAMPLES each fourth one in this program goes to a file
 * in that directory.
 */
static inline void image_sample(const uint8_t *bytes, size_t len)
{
    static unsigned count;
    const char *dir = getenv("CAIRN_CRASH_SAMPLES");
    char path[1200];

    if (!dir || count++ % 4)
        return;
    (void)snprintf(path, sizeof(path), "%s/%d-%u.qcow2", dir, (int)getpid(), count);
    image_put(NULL, path, bytes, len);
}

/* The image is sound; prints why not, and aborts. */
static inline void image_judge(struct sim_disk *disk, const char *path, enum leaks leaks,
                               struct qcow2_verdict *ret)
{
    size_t len;
    uint8_t *bytes = image_load(disk, path, &len);
    struct qcow2_file f = qcow2_file_in_memory(bytes, len);
    int r = qcow2_check(&f, ret);
    unsigned errors = ret->errors;

    if (leaks != NO_LEAKS)
        image_sample(bytes, len);
    free(bytes);
    if (leaks == LEAKS_AND_COPIES_ALLOWED)
        errors -= ret->by_kind[QCOW2_ERROR_NOT_COPIED];
    if (r == 0 && errors == 0 && (leaks != NO_LEAKS || ret->leaks == 0))
        return;
    fprintf(
        stderr,
        "'%s' (version %u, 2^%u, %u refcount bits) is not sound: %d, %u errors, %u leaks (%u beyond the end)\n%s",
        path, ret->version, ret->cluster_bits, ret->refcount_bits, r, ret->errors, ret->leaks,
        ret->leaks_beyond, ret->text);
    abort();
}

/* What a guest reads of a chain of images, by the judge; `paths` from the top down. */
static inline void image_read_guest(struct sim_disk *disk, const char *const *paths, unsigned count,
                                    uint64_t offset, void *buf, size_t len)
{
    struct qcow2_layer layers[16];
    uint8_t *bytes[16];
    uint8_t *data[16] = {NULL};
    char name[1024], path[1200];
    size_t size;

    check(count <= ARRAY_SIZE(layers));
    for (unsigned i = 0; i < count; i++) {
        bytes[i] = image_load(disk, paths[i], &size);
        layers[i] = (struct qcow2_layer){.file = qcow2_file_in_memory(bytes[i], size)};
        check(qcow2_see_data_file(&layers[i].file, name) == 0);
        if (!*name)
            continue;
        image_beside(path, paths[i], name);
        data[i] = image_load(disk, path, &size);
        layers[i].data = qcow2_file_in_memory(data[i], size);
    }
    check(qcow2_read_guest(layers, count, offset, buf, len) == 0);
    for (unsigned i = 0; i < count; i++) {
        free(bytes[i]);
        free(data[i]);
    }
}

/* What a raw data file holds is what a guest reads, and no more. */
static inline void image_judge_raw_data(struct sim_disk *disk, const char *path, uint64_t size)
{
    uint8_t *shown = xalloc(1, size + 1);
    uint8_t *bytes;
    struct qcow2_file f;
    char name[1024], data[1200];
    size_t len;

    image_read_guest(disk, &path, 1, 0, shown, size);
    bytes = image_load(disk, path, &len);
    f = qcow2_file_in_memory(bytes, len);
    check(qcow2_see_data_file(&f, name) == 0 && *name);
    free(bytes);
    image_beside(data, path, name);
    bytes = image_load(disk, data, &len);
    check(len == size && memcmp(bytes, shown, size) == 0);
    free(bytes);
    free(shown);
}

/* ---- nodes ---- */

/* Adds a node or aborts: also for coroutines and children where a test cannot fail in order. */
#define add_or_die(g, ...)                                                                         \
    do {                                                                                           \
        struct error *die_err = NULL;                                                              \
                                                                                                   \
        if (add_node((g), &die_err, __VA_ARGS__) < 0) {                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, error_text(die_err));               \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* Options of the layers that are added from now on: of the driver, each with a comma behind it. */
static const char *layer_options = "";

/* A layer over `backing` (a node, or NULL for none), with discards passed on. */
static inline void add_layer(struct graph *g, const char *name, const char *path,
                             const char *backing, bool read_only)
{
    const char *quote = backing ? "'" : "";

    add_or_die(g,
               "{'driver':'qcow2','node-name':'%s','discard':'unmap','read-only':%s,%s"
               "'file':{'driver':'file','filename':'%s'},'backing':%s%s%s}",
               name, read_only ? "true" : "false", layer_options, path, quote,
               backing ? backing : "null", quote);
}

/* A filter under the name of raw that counts what makes data durable, and can tell the test of it. */
struct flush_watch {
    unsigned flushes; /* flushes, and writes with FUA */
    unsigned reads;
    unsigned writes;
    void (*around)(void *arg, bool after);
    void *arg;
};

static struct flush_watch flush_watch;

static int flush_filter_co_open(struct node *node, const void *options, struct error **err)
{
    (void)options;
    (void)err;
    node_set_size(node, node_size(edge_node(node_file(node))));
    return 0;
}

static void flush_filter_co_close(struct node *node)
{
    (void)node;
}

static int flush_filter_co_request(struct node *node, struct request *req)
{
    bool is_flush = req->kind == REQUEST_FLUSH || (req->flags & REQUEST_FUA);
    int r;

    flush_watch.flushes += is_flush;
    flush_watch.reads += req->kind == REQUEST_READ;
    flush_watch.writes += req->kind == REQUEST_WRITE;
    if (is_flush && flush_watch.around)
        flush_watch.around(flush_watch.arg, false);
    r = edge_co_request(node_file(node), req);
    if (is_flush && flush_watch.around)
        flush_watch.around(flush_watch.arg, true);
    return r;
}

static const struct driver flush_filter_driver = {
    .name = "raw",
    .kind = DRIVER_FILTER,
    .options = &raw_options_type,
    .state_size = 8,
    .fua = true,
    .zeroes_fast = true,
    .co_open = flush_filter_co_open,
    .co_close = flush_filter_co_close,
    .co_read = flush_filter_co_request,
    .co_write = flush_filter_co_request,
    .co_write_zeroes = flush_filter_co_request,
    .co_discard = flush_filter_co_request,
    .co_copy_out = flush_filter_co_request,
    .co_copy_in = flush_filter_co_request,
    .co_flush = flush_filter_co_request,
};

/* As add_layer(), with the filter between, also above the external data file if there is one. */
static inline void add_watched_layer(struct graph *g, const char *name, const char *path,
                                     const char *backing, const char *data)
{
    const char *quote = backing ? "'" : "";
    char data_file[300] = "";

    if (data)
        (void)snprintf(data_file, sizeof(data_file),
                       "'data-file':{'driver':'raw','file':{'driver':'file','filename':'%s'}},",
                       data);

    add_or_die(g,
               "{'driver':'qcow2','node-name':'%s','discard':'unmap',%s%s"
               "'file':{'driver':'raw','file':{'driver':'file','filename':'%s'}},'backing':%s%s%s}",
               name, layer_options, data_file, path, quote, backing ? backing : "null", quote);
}

#endif
