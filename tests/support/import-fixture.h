/* SPDX-License-Identifier: Apache-2.0 */
/* For tests of formats that are only read: an image on the simulated disk, opened and compared, or refused. */
#ifndef CAIRN_TESTS_IMPORT_FIXTURE_H
#define CAIRN_TESTS_IMPORT_FIXTURE_H

#include "formats/list.h"
#include "graph-fixture.h"
#include "import-make.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "sim-run.h"

#include <errno.h>

static const struct driver *const *const import_drivers[] = {protocol_drivers, format_drivers,
                                                             NULL};

struct import_case {
    const char *driver;
    const struct image_bytes *image;
    const char *message; /* NULL: it opens */
    int errnum;          /* of the refusal; or of a read of all of it */
};

static inline void import_put(struct sim_disk *disk, const char *path, const void *bytes,
                              size_t len)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR};

    sim_disk_make(disk, path, &setup);
    sim_disk_write(disk, path, 0, bytes, len);
}

static inline void import_run(struct sim_disk *disk, co_entry_fn *body, void *arg)
{

    assert_int_equal(run_on(disk, 1, body, arg), SIM_RETURNED);
}

/* Reads the disk in pieces of this length and compares it. */
static inline void import_compare(struct backend *b, const struct image_bytes *image, size_t step)
{
    uint8_t *data = xalloc(step, 1);

    assert_int_equal(backend_size(b), image->disk_len);
    for (size_t at = 0; at < image->disk_len; at += step) {
        size_t len = MIN(step, image->disk_len - at);

        assert_int_equal(read_at(b, at, len, data), 0);
        for (size_t i = 0; i < len; i++) {
            if (data[i] != image->disk[at + i])
                fail_msg("byte %zu is 0x%02x, and not 0x%02x", at + i, data[i],
                         image->disk[at + i]);
        }
    }
    free(data);
}

/* What extents call zero reads so, and they cover the disk. */
static inline void import_compare_extents(struct backend *b, const struct image_bytes *image)
{
    for (uint64_t at = 0; at < image->disk_len;) {
        struct extent v[4];
        struct extents e = {.v = v, .max = ARRAY_SIZE(v)};
        struct request req = {
            .kind = REQUEST_EXTENTS, .offset = at, .len = image->disk_len - at, .extents = &e};

        assert_int_equal(backend_co_request(b, &req), 0);
        assert_true(e.count > 0);
        for (unsigned i = 0; i < e.count; i++) {
            for (uint64_t k = 0; v[i].flags & EXTENT_ZERO && k < v[i].len; k++)
                assert_int_equal(image->disk[v[i].offset + k], 0);
        }
        at = extents_end(&e, at);
    }
}

static inline void import_open_body(void *arg)
{
    const struct import_case *c = arg;
    struct graph *g = graph_new(import_drivers);

    if (c->message) {
        must_refuse(c->errnum, c->message, g,
                    "{'driver':'%s','node-name':'d','read-only':true,'file':"
                    "{'driver':'file','filename':'/disk/image'}}",
                    c->driver);
    } else {
        struct backend *b;
        uint8_t *data = xalloc(c->image->disk_len + 1, 1);

        must_add(g,
                 "{'driver':'%s','node-name':'d','read-only':true,'file':"
                 "{'driver':'file','filename':'/disk/image'}}",
                 c->driver);
        b = must_attach(g, "d", (struct access){ACCESS_READ, ACCESS_ALL}, "test");
        if (c->errnum) {
            assert_int_equal(read_at(b, 0, backend_size(b), data), -c->errnum);
        } else {
            import_compare(b, c->image, c->image->disk_len);
            import_compare(b, c->image, 1000);
            import_compare_extents(b, c->image);
        }
        free(data);
        backend_co_free(b);
    }
    graph_co_free(g);
}

static inline void import_check_case(struct import_case *c)
{
    struct sim_disk *disk = sim_disk_new();

    import_put(disk, "/disk/image", c->image->bytes, c->image->len);
    import_run(disk, import_open_body, c);
    sim_disk_free(disk);
}

/* It opens, and shows what it should. */
static inline void import_must_show(const char *driver, const struct image_bytes *image)
{
    struct import_case c = {.driver = driver, .image = image};

    import_check_case(&c);
}

/* Frees the image. */
static inline void import_must_refuse(const char *driver, struct image_bytes image, int errnum,
                                      const char *message)
{
    struct import_case c = {driver, &image, message, errnum};

    import_check_case(&c);
    image_bytes_free(&image);
}

/* It opens, and reads of damaged places fail. Frees the image. */
static inline void import_must_fail_reads(const char *driver, struct image_bytes image)
{
    struct import_case c = {.driver = driver, .image = &image, .errnum = EIO};

    import_check_case(&c);
    image_bytes_free(&image);
}

#endif
