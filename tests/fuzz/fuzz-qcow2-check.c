/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hostile images (P6), to check and repair under sim: nothing may crash, hang or take memory without bound. Whatever a repair calls
 * sound, the next check must call sound, too.
 *
 * An input begins with the shape of a sound image, and what is to be done; then come patches, each of where (which structure,
 * which place in it), how and what.
 */
#include "../support/qcow2-make.h"
#include "base/macros.h"
#include "formats/list.h"
#include "formats/qcow2/qcow2-check.h"
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

#define IMAGE      "/disk/image"
#define SIZE       ((uint64_t)256 << 10)
#define PATCH_LEN  12
#define MEMORY_MAX ((uint64_t)8 << 20)
#define EXTRA      4 /* clusters for a snapshot table, an L1 table, a bitmap directory and its table */

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct input {
    const uint8_t *bytes;
    size_t len;
    uint64_t cluster;
    uint64_t extra; /* offset of the clusters above */
    struct graph *graph;
};

enum place {
    PLACE_HEADER,
    PLACE_L1,
    PLACE_L2,
    PLACE_TABLE,
    PLACE_BLOCK,
    PLACE_SNAPSHOTS,
    PLACE_BITMAPS,
    PLACE_ANY,
    PLACES,
};

static uint64_t place_offset(const struct input *in, const uint8_t *image, size_t len,
                             enum place place)
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
        return table;
    case PLACE_L2:
        return l1 < len - 8 ? load_be64(image + l1) & 0xfffffffffffe00 : 0;
    case PLACE_BLOCK:
        return table < len - 8 ? load_be64(image + table) & ~(uint64_t)0x1ff : 0;
    case PLACE_SNAPSHOTS:
        return in->extra;
    case PLACE_BITMAPS:
        return in->extra + 2 * in->cluster;
    }
    return 0;
}

/* place, index (2 bytes), kind, value (8 bytes) */
static void apply_patch(const struct input *in, uint8_t *image, size_t len, const uint8_t *p)
{
    enum place place = p[0] % PLACES;
    uint64_t index = load_be16(p + 1);
    uint64_t value = load_be64(p + 4);
    uint64_t at = place_offset(in, image, len, place);

    at += place == PLACE_ANY ? index * 16
                             : index % (place == PLACE_HEADER ? 256 : 1024) * (p[3] & 1 ? 1 : 8);
    if (at > len - 8)
        return;
    switch (p[3] >> 1 & 3) {
    case 0:
        store_be64(image + at, value);
        break;
    case 1: /* a cluster of the file, with flags */
        store_be64(image + at,
                   (value & 0xff) * in->cluster | (value >> 56) << 56 | (value >> 8 & 1));
        break;
    case 2:
        image[at] = (uint8_t)value;
        break;
    case 3:
        store_be32(image + at, (uint32_t)value);
        break;
    }
}

/* One snapshot, whose L1 table is empty, and one bitmap, whose table is. Their clusters are not counted: patches may do that. */
static void put_extra(const struct input *in, uint8_t *image, uint8_t what)
{
    uint64_t directory = in->extra + 2 * in->cluster;
    uint8_t *s = image + in->extra;
    uint8_t *b = image + directory;

    if (what & 1) {
        store_be32(image + 60, 1);
        store_be64(image + 64, in->extra);
        store_be64(s, in->extra + in->cluster);
        store_be32(s + 8, 1);
        store_be16(s + 12, 1);
        store_be32(s + 36, 16);
    }
    if (what & 2) { /* version 3: the extension lies behind the header */
        store_be64(image + 88, 1);
        store_be32(image + 104, 0x23852875);
        store_be32(image + 108, 24);
        store_be32(image + 112, 1);
        store_be64(image + 120, 32);
        store_be64(image + 128, directory);
        store_be64(b, in->extra + 3 * in->cluster);
        store_be32(b + 8, 1);
        b[16] = 1;
        b[17] = 16;
        store_be16(b + 18, 1);
        b[24] = 'b';
    }
}

static bool make_image(struct sim_disk *disk, struct input *in)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR};
    struct qcow2_shape shape = {.refcount_order = 4, .size = SIZE};
    uint8_t *sound, *image;
    size_t len;

    if (in->len < 4)
        return false;
    shape.version = in->bytes[0] & 1 ? 2 : 3;
    shape.cluster_bits = 9 + (in->bytes[0] >> 1 & 7);
    if (shape.version == 3)
        shape.refcount_order = in->bytes[1] % 7;
    shape.allocated = (SIZE >> shape.cluster_bits) * in->bytes[2] / 255;
    in->cluster = (uint64_t)1 << shape.cluster_bits;
    sound = qcow2_make(&shape, &len);
    in->extra = len;
    image = xalloc(1, len + EXTRA * in->cluster);
    memcpy(image, sound, len);
    free(sound);
    len += EXTRA * in->cluster;
    put_extra(in, image, in->bytes[3] & (shape.version == 3 ? 3 : 1));
    for (size_t at = 4; at + PATCH_LEN <= in->len && at < 4 + 64 * PATCH_LEN; at += PATCH_LEN)
        apply_patch(in, image, len, in->bytes + at);
    if (in->bytes[3] & 8)
        len -= len * (in->bytes[3] >> 4) / 16; /* cut off */
    sim_disk_make(disk, IMAGE, &setup);
    sim_disk_write(disk, IMAGE, 0, image, len);
    free(image);
    return true;
}

static int co_fn control_fn add_file(struct input *in, struct error **err)
{
    struct node_options file = {.driver = NODE_DRIVER_FILE,
                                .node_name = (char *)(uintptr_t) "file"};

    file.u.file.filename = (char *)(uintptr_t)IMAGE;
    return graph_co_add(in->graph, &file, err);
}

static int co_fn check_as(struct backend *b, enum qcow2_repair repair,
                          struct qcow2_check_result *ret)
{
    AUTO(error_free) struct error *err = NULL;
    struct qcow2_check_options o = {.repair = repair, .memory_max = MEMORY_MAX};

    return qcow2_co_check(b, &o, ret, &err);
}

static void co_fn control_fn run_input(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct input *in = arg;
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE | ACCESS_RESIZE,
                            .tolerates = ACCESS_ALL};
    struct qcow2_check_result found, repaired, again;
    struct backend *b = NULL;

    in->graph = graph_new(drivers);
    if (add_file(in, &err) < 0 || backend_co_new(&b, in->graph, "file", access, "f", &err) < 0 ||
        backend_attach(b) < 0)
        abort();
    if (check_as(b, QCOW2_REPAIR_NOTHING, &found) == 0 &&
        check_as(b, in->bytes[3] & 4 ? QCOW2_REPAIR_LEAKS : QCOW2_REPAIR_ALL, &repaired) == 0) {
        if (check_as(b, QCOW2_REPAIR_NOTHING, &again) < 0 ||
            again.corruptions != repaired.corruptions || again.leaks != repaired.leaks)
            abort();
        if (repaired.corruptions > found.corruptions && !found.corruptions)
            abort();
    }
    b = backend_co_free(b);
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
