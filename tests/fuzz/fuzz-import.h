/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hostile images of the formats that are only read (P6), to the whole driver under sim: open, reads, extents, close. Nothing may
 * crash, hang or take memory without bound; errors are welcome.
 *
 * An input begins with the shape of a sound image. Then come patches, each of where (which structure, which place in it), how
 * and what; checksums are made right again, unless the shape says that they are not, and the file may be cut.
 */
#ifndef CAIRN_TESTS_FUZZ_IMPORT_H
#define CAIRN_TESTS_FUZZ_IMPORT_H

#include "../support/import-make.h"
#include "base/macros.h"
#include "formats/list.h"
#include "fuzz-sim.h"
#include "graph/backend.h"
#include "graph/graph.h"
#include "protocols/list.h"
#include "schema-types.h"

#include <jansson.h>

#include "base/json-in.h"

#define IMPORT_FUZZ_HEAD    3
#define IMPORT_FUZZ_PATCH   12
#define IMPORT_FUZZ_PATCHES 32
#define IMPORT_FUZZ_CHUNK   65536

/* What a fuzzer says of its format. */
struct import_fuzzer {
    const char *driver;
    struct image_bytes (*make)(uint8_t shape);
    /* Where the structure of this number begins. */
    size_t (*place)(const struct image_bytes *image, unsigned number);
    void (*fix)(struct image_bytes *image); /* makes checksums right; may be NULL */
};

extern const struct import_fuzzer import_fuzzer;

static const struct driver *const *const import_fuzz_drivers[] = {protocol_drivers, format_drivers,
                                                                  NULL};

/* place, index (2 bytes), kind, value (8 bytes) */
static inline void import_fuzz_patch(struct image_bytes *i, const uint8_t *p)
{
    size_t at = import_fuzzer.place(i, p[0]) + load_le16(p + 1);
    uint64_t value = load_le64(p + 4);

    if (at + 8 > i->len)
        return;
    switch (p[3] % 7) {
    case 0:
        i->bytes[at] = (uint8_t)value;
        break;
    case 1:
        store_le16(i->bytes + at, (uint16_t)value);
        break;
    case 2:
        store_le32(i->bytes + at, (uint32_t)value);
        break;
    case 3:
        store_be32(i->bytes + at, (uint32_t)value);
        break;
    case 4:
        store_le64(i->bytes + at, value);
        break;
    case 5:
        store_be64(i->bytes + at, value);
        break;
    case 6:
        store_le32(i->bytes + at, load_le32(i->bytes + at) + (uint32_t)(int8_t)value);
        break;
    }
}

static inline void co_fn control_fn import_fuzz_use(struct graph *g)
{
    static uint8_t data[IMPORT_FUZZ_CHUNK];
    struct access access = {ACCESS_READ, ACCESS_ALL};
    struct error *err = NULL;
    struct backend *b;
    uint64_t size;

    if (backend_co_new(&b, g, "d", access, "fuzzer", &err) < 0 || backend_attach(b) < 0)
        abort();
    size = backend_size(b);
    for (unsigned n = 0; n < 5 && size; n++) {
        uint64_t at = n < 4 ? (uint64_t)n * IMPORT_FUZZ_CHUNK : size - MIN(size, (uint64_t)4096);
        uint64_t left = size - MIN(at, size);
        struct iovec iov = {data, (size_t)MIN((uint64_t)IMPORT_FUZZ_CHUNK, left)};
        struct request req = {
            .kind = REQUEST_READ, .offset = at, .len = iov.iov_len, .iov = &iov, .iov_count = 1};
        struct extent v[8];
        struct extents e = {.v = v, .max = ARRAY_SIZE(v)};
        struct request map = {.kind = REQUEST_EXTENTS, .offset = at, .extents = &e};

        if (!left)
            continue;
        map.len = MIN(left, (uint64_t)1 << 30);
        (void)backend_co_request(b, &req);
        (void)backend_co_request(b, &map);
    }
    (void)backend_co_free(b);
}

static inline void co_fn control_fn import_fuzz_body(void *arg)
{
    struct node_options options = {.node_name = NULL};
    struct graph *g = graph_new(import_fuzz_drivers);
    struct error *err = NULL;
    json_t *tree =
        json_pack("{s:s, s:s, s:b, s:{s:s, s:s}}", "driver", import_fuzzer.driver, "node-name", "d",
                  "read-only", 1, "file", "driver", "file", "filename", "/disk/image");

    (void)arg;
    if (json_in(&node_options_type, tree, JSON_IN_STRICT, "", &options, &err) < 0)
        abort();
    json_decref(tree);
    if (graph_co_add(g, &options, &err) == 0)
        import_fuzz_use(g);
    error_free(&err);
    schema_free(&node_options_type, &options);
    graph_co_free(g);
}

/* Without what is zeroes: images are large. */
static inline void import_fuzz_put(struct sim_disk *disk, const struct image_bytes *i)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = i->len};
    static const uint8_t zeroes[4096];

    sim_disk_make(disk, "/disk/image", &setup);
    for (size_t at = 0; at < i->len; at += sizeof(zeroes)) {
        size_t len = MIN(sizeof(zeroes), i->len - at);

        if (memcmp(i->bytes + at, zeroes, len) != 0)
            sim_disk_write(disk, "/disk/image", at, i->bytes + at, len);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct image_bytes image;
    struct sim_disk *disk;

    if (size < IMPORT_FUZZ_HEAD)
        return 0;
    image = import_fuzzer.make(data[0]);
    for (size_t n = 0; n < IMPORT_FUZZ_PATCHES; n++) {
        size_t at = IMPORT_FUZZ_HEAD + n * IMPORT_FUZZ_PATCH;

        if (at + IMPORT_FUZZ_PATCH <= size)
            import_fuzz_patch(&image, data + at);
    }
    if (import_fuzzer.fix && !(data[1] & 1))
        import_fuzzer.fix(&image);
    if (data[1] & 2)
        image.len -= image.len * data[2] / 256; /* cut off */
    disk = sim_disk_new();
    import_fuzz_put(disk, &image);
    image_bytes_free(&image);
    fuzz_run(disk, import_fuzz_body, NULL);
    return 0;
}

#endif
