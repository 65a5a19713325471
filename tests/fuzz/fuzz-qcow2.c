/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hostile images (P6), to the whole driver under sim: open, reads, writes, zeroes, discards, flush, resize, close. Nothing may
 * crash, hang or take memory without bound; errors are welcome.
 *
 * An input begins with the shape of a sound image: its version and cluster size, refcount width, how much of it is allocated, and
 * whether it is opened read-only, or a snapshot in it is shown. Then come patches, each of where (which structure, which place in it), how (an integer of how
 * many bytes, or the entry's place with other flags) and what.
 */
#include "../support/qcow2-make.h"
#include "base/macros.h"
#include "formats/list.h"
#include "graph/backend.h"
#include "graph/graph.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "schema-types.h"

#include <stdlib.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Of the address sanitizer; absent in other builds. */
extern int __asan_option_detect_stack_use_after_return __attribute__((weak));

#define IMAGE     "/disk/image"
#define SIZE      ((uint64_t)256 << 10)
#define PATCH_LEN 12
#define CHUNK     65536

/* In the header. */
#define AT_SNAPSHOT_COUNT 60
#define AT_SNAPSHOTS      64
#define SNAPSHOT_LEN      (40 + 24 + 1 + 1)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct input {
    const uint8_t *bytes;
    size_t len;
    bool read_only;
    bool snapshot; /* is shown; in patches its table takes the place of the refcount table */
    struct graph *graph;
    struct backend *backend;
    uint8_t data[CHUNK];
};

enum place { PLACE_HEADER, PLACE_L1, PLACE_L2, PLACE_TABLE, PLACE_BLOCK, PLACE_ANY, PLACES };

static uint64_t place_offset(const uint8_t *image, size_t len, enum place place)
{
    uint64_t l1 = load_be64(image + 40);
    uint64_t table = load_be64(image + 48);

    switch (place) {
    case PLACE_HEADER:
    case PLACE_ANY:
    case PLACES:
        break;
    case PLACE_L1:
        return l1;
    case PLACE_TABLE:
        return load_be32(image + AT_SNAPSHOT_COUNT) ? load_be64(image + AT_SNAPSHOTS) : table;
    case PLACE_L2:
        return l1 + 8 < len ? load_be64(image + l1) & 0xfffffffffffe00 : 0;
    case PLACE_BLOCK:
        return table + 8 < len ? load_be64(image + table) & ~(uint64_t)0x1ff : 0;
    }
    return 0;
}

/* place, index (2 bytes), kind, value (8 bytes) */
static void apply_patch(uint8_t *image, size_t len, uint64_t cluster, const uint8_t *p)
{
    enum place place = p[0] % PLACES;
    uint64_t index = load_be16(p + 1);
    uint64_t value = load_be64(p + 4);
    uint64_t at = place_offset(image, len, place);

    at += place == PLACE_ANY ? index * 16
                             : index % (place == PLACE_HEADER ? 256 : 1024) * (p[3] & 1 ? 1 : 8);
    if (at + 8 > len)
        return;
    switch (p[3] >> 1 & 3) {
    case 0:
        store_be64(image + at, value);
        break;
    case 1: /* a cluster of the file, with flags */
        store_be64(image + at, (value & 0xff) * cluster | (value >> 56) << 56 | (value >> 8 & 1));
        break;
    case 2:
        image[at] = (uint8_t)value;
        break;
    case 3:
        store_be32(image + at, (uint32_t)value);
        break;
    }
}

/* One in a cluster of its own at the end, which has the disk's own L1 table. For readers refcounts do not matter. */
static uint8_t *add_snapshot(uint8_t *image, size_t *len, uint64_t cluster)
{
    uint8_t *e;

    image = realloc(image, *len + cluster);
    if (!image)
        abort();
    e = image + *len;
    memset(e, 0, cluster);
    store_be32(image + AT_SNAPSHOT_COUNT, 1);
    store_be64(image + AT_SNAPSHOTS, *len);
    memcpy(e, image + 40, 8);     /* L1 offset */
    memcpy(e + 8, image + 36, 4); /* and size */
    store_be16(e + 12, 1);
    store_be16(e + 14, 1);
    store_be32(e + 36, 24);
    store_be64(e + 40 + 8, SIZE);
    e[SNAPSHOT_LEN - 2] = '1';
    e[SNAPSHOT_LEN - 1] = 'a';
    *len += cluster;
    return image;
}

static bool make_image(struct sim_disk *disk, struct input *in)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR};
    struct qcow2_shape shape = {.refcount_order = 4, .size = SIZE};
    uint8_t *image;
    size_t len;

    if (in->len < 4)
        return false;
    shape.version = in->bytes[0] & 1 ? 2 : 3;
    shape.cluster_bits = 9 + (in->bytes[0] >> 1 & 7);
    if (shape.version == 3)
        shape.refcount_order = in->bytes[1] % 7;
    shape.allocated = (SIZE >> shape.cluster_bits) * in->bytes[2] / 255;
    in->snapshot = in->bytes[1] & 0x80;
    in->read_only = in->bytes[3] & 1 || in->snapshot;
    image = qcow2_make(&shape, &len);
    if (in->snapshot)
        image = add_snapshot(image, &len, (uint64_t)1 << shape.cluster_bits);
    for (size_t at = 4; at + PATCH_LEN <= in->len && at < 4 + 64 * PATCH_LEN; at += PATCH_LEN)
        apply_patch(image, len, (uint64_t)1 << shape.cluster_bits, in->bytes + at);
    if (in->bytes[3] & 2)
        len -= len * (in->bytes[3] >> 2) / 64; /* cut off */
    sim_disk_make(disk, IMAGE, &setup);
    sim_disk_write(disk, IMAGE, 0, image, len);
    free(image);
    return true;
}

static void co_fn send_some(struct input *in, enum request_kind kind, unsigned flags,
                            uint64_t offset, uint64_t len)
{
    bool carries = kind == REQUEST_READ || kind == REQUEST_WRITE;
    uint64_t size = backend_size(in->backend);
    struct iovec iov = {in->data, 0};
    struct request req = {.kind = kind, .flags = flags, .offset = offset};

    if (offset >= size)
        return;
    req.len = iov.iov_len = MIN(len, size - offset);
    req.iov = &iov;
    req.iov_count = carries;
    (void)backend_co_request(in->backend, &req);
}

static void co_fn describe(struct input *in, uint64_t offset)
{
    struct extent v[8];
    struct extents e = {.v = v, .max = ARRAY_SIZE(v)};
    struct request req = {.kind = REQUEST_EXTENTS, .offset = offset, .extents = &e};
    uint64_t size = backend_size(in->backend);

    if (offset >= size)
        return;
    req.len = MIN(size - offset, SIZE);
    (void)backend_co_request(in->backend, &req);
}

static void co_fn use(struct input *in)
{
    uint64_t size = backend_size(in->backend);

    for (uint64_t at = 0; at < size && at < SIZE; at += CHUNK) {
        send_some(in, REQUEST_READ, 0, at, CHUNK);
        describe(in, at);
    }
    send_some(in, REQUEST_READ, 0, size - MIN(size, (uint64_t)1000), 1000);
    if (in->read_only)
        return;
    send_some(in, REQUEST_WRITE, 0, 0, 700);
    send_some(in, REQUEST_WRITE, REQUEST_FUA, 5000, 9000);
    send_some(in, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, 16384, 20000);
    send_some(in, REQUEST_DISCARD, 0, 40000, 70000);
    send_some(in, REQUEST_WRITE, 0, 60000, CHUNK);
    send_some(in, REQUEST_FLUSH, 0, 0, 0);
    send_some(in, REQUEST_WRITE, 0, 40000, 30000);
    send_some(in, REQUEST_WRITE, 0, size - MIN(size, (uint64_t)1000), 1000);
    send_some(in, REQUEST_READ, 0, 30000, CHUNK);
}

static void co_fn control_fn resize(struct input *in, uint64_t size)
{
    AUTO(error_free) struct error *err = NULL;

    (void)graph_co_resize(in->graph, "top", size, &err);
}

static int co_fn control_fn add_disk(struct input *in, struct error **err)
{
    struct node_options file = {.driver = NODE_DRIVER_FILE};
    struct node_ref below = {.kind = NODE_REF_DEFINITION};
    struct node_ref_or_null none = {.kind = NODE_REF_OR_NULL_NULL};
    struct qcow2_snapshot_ref snapshot = {.kind = QCOW2_SNAPSHOT_REF_ANY};
    struct node_options disk = {
        .driver = NODE_DRIVER_QCOW2,
        .node_name = (char *)(uintptr_t) "top",
        .has_read_only = true,
        .read_only = in->read_only,
        .has_discard = true,
        .discard = DISCARD_MODE_UNMAP,
    };

    file.u.file.filename = (char *)(uintptr_t)IMAGE;
    below.definition = &file;
    disk.u.qcow2.file = below;
    disk.u.qcow2.backing = &none;
    snapshot.any = (char *)(uintptr_t) "1";
    if (in->snapshot)
        disk.u.qcow2.snapshot = &snapshot;
    disk.u.qcow2.l2_cache_size = 1 << 20;
    return graph_co_add(in->graph, &disk, err);
}

static void co_fn control_fn run_input(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct input *in = arg;
    struct access access = {.wants = ACCESS_READ | (in->read_only ? 0 : ACCESS_WRITE),
                            .tolerates = ACCESS_ALL};

    in->graph = graph_new(drivers);
    if (add_disk(in, &err) == 0 &&
        backend_co_new(&in->backend, in->graph, "top", access, "fuzzer", &err) == 0) {
        if (backend_attach(in->backend) < 0)
            abort();
        use(in);
        if (!in->read_only) {
            resize(in, SIZE / 2);
            resize(in, SIZE * 2);
            send_some(in, REQUEST_WRITE, 0, SIZE + 5000, 9000);
        }
        in->backend = backend_co_free(in->backend);
    }
    in->graph = graph_co_free(in->graph);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    if (&__asan_option_detect_stack_use_after_return)
        __asan_option_detect_stack_use_after_return = 0;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct input in;
    struct sim_disk *disk = sim_disk_new();
    struct sim_options o;

    in = (struct input){.bytes = data, .len = size};
    if (make_image(disk, &in)) {
        sim_options_init(&o, 1);
        o.disk = disk;
        o.max_steps = 1000000; /* a hang is an endless run */
        if (sim_run(&o, run_input, &in) != SIM_RETURNED)
            abort();
    }
    sim_disk_free(disk);
    return 0;
}
