/* SPDX-License-Identifier: Apache-2.0 */
/* The first bytes of a qcow2 image, which a case changes, and what the parser says of them. */
#ifndef CAIRN_TESTS_QCOW2_HEADER_FIXTURE_H
#define CAIRN_TESTS_QCOW2_HEADER_FIXTURE_H

#include "base/alloc.h"
#include "base/endian.h"
#include "formats/qcow2/qcow2-create.h"
#include "formats/qcow2/qcow2-header.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#define DISK_SIZE (1 * GIB)

/* The first bytes of an image, which a case changes, and the file's size. */
struct image {
    uint8_t bytes[QCOW2_HEADER_BYTES_MAX];
    size_t len;
    uint64_t file_size;
};

static struct image *image_new(const struct qcow2_create_options *o)
{
    struct image *image = xnew(struct image);
    struct qcow2_layout layout;
    struct error *err = NULL;

    if (qcow2_layout_make(o, &layout, &err) < 0)
        fail_msg("%s", error_text(err));
    image->file_size = layout.file_size;
    image->len = (size_t)MIN(layout.file_size, QCOW2_HEADER_BYTES_MAX);
    qcow2_layout_read(&layout, 0, image->bytes, image->len);
    return image;
}

/* 1 GiB, clusters of 64 KiB, L1 table of 2 entries at 192 KiB, a file of 256 KiB. */
static struct image *image_plain(void)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;

    o.size = DISK_SIZE;
    return image_new(&o);
}

static struct image *image_backed(void)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;

    o.size = DISK_SIZE;
    o.backing_file = "base.img";
    o.backing_format = "raw";
    return image_new(&o);
}

static void put(struct image *image, size_t offset, unsigned width, uint64_t value)
{
    if (width == 8)
        store_be64(image->bytes + offset, value);
    else if (width == 4)
        store_be32(image->bytes + offset, (uint32_t)value);
    else
        image->bytes[offset] = (uint8_t)value;
}

/* The parser gets memory that ends where the bytes do, so that sanitizers see what reads on. */
static int parse(const struct image *image, struct qcow2_header *ret, struct error **err)
{
    uint8_t *exact = malloc(image->len + (image->len == 0));
    int r;

    memcpy(exact, image->bytes, image->len);
    r = qcow2_header_parse(ret, exact, image->len, image->file_size, "x", err);
    free(exact);
    return r;
}

static void must_parse(const struct image *image, struct qcow2_header *ret)
{
    struct error *err = NULL;

    memset(ret, 0xee, sizeof(*ret));
    if (parse(image, ret, &err) != 0)
        fail_msg("%s", error_text(err));
}

/* Frees the image. */
static void must_refuse(struct image *image, int errnum, const char *message)
{
    struct error *err = NULL;
    struct qcow2_header h;
    int r = parse(image, &h, &err);

    if (r == 0)
        fail_msg("accepted, but expected: %s", message);
    assert_string_equal(error_text(err), message);
    assert_int_equal(r, -errnum);
    assert_int_equal(error_errno(err), errnum);
    error_free(&err);
    free(image);
}

#endif
