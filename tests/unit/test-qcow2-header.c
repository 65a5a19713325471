/* SPDX-License-Identifier: Apache-2.0 */
/* The header of qcow2 images: what is read from it, and each thing that is refused, with its message. */
#include "formats/qcow2/qcow2-header.h"

#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/prng.h"
#include "formats/qcow2/qcow2-create.h"
#include "graph/node.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
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

static void test_qcow2_header__reads_every_field(void **state)
{
    struct image *image = image_backed();
    struct qcow2_header h;

    (void)state;
    put(image, QCOW2_OFFSET_COMPATIBLE, 8, 0xfffffffffffffff1);
    put(image, QCOW2_OFFSET_AUTOCLEAR, 8, 0xff00000000000002);
    put(image, QCOW2_OFFSET_INCOMPATIBLE, 8, QCOW2_INCOMPATIBLE_DIRTY);
    put(image, QCOW2_OFFSET_REFCOUNT_ORDER, 4, 6);
    must_parse(image, &h);
    assert_int_equal(h.version, 3);
    assert_int_equal(h.cluster_bits, 16);
    assert_int_equal(qcow2_header_cluster_size(&h), 65536);
    assert_int_equal(h.size, DISK_SIZE);
    assert_int_equal(h.l1_size, 2);
    assert_int_equal(h.l1_offset, 0x30000);
    assert_int_equal(h.refcount_table_offset, 0x10000);
    assert_int_equal(h.refcount_table_clusters, 1);
    assert_int_equal(h.refcount_order, 6);
    assert_int_equal(h.snapshot_count, 0);
    assert_int_equal(h.crypt_method, QCOW2_CRYPT_NONE);
    assert_int_equal(h.incompatible, QCOW2_INCOMPATIBLE_DIRTY);
    assert_int_equal(h.compatible, 0xfffffffffffffff1);
    assert_int_equal(h.autoclear, 0xff00000000000002);
    assert_int_equal(h.header_length, 112);
    assert_int_equal(h.compression_type, QCOW2_COMPRESSION_ZLIB);
    assert_string_equal(h.backing_file, "base.img");
    assert_string_equal(h.backing_format, "raw");
    assert_false(h.has_bitmaps);
    assert_int_equal(h.extension_count, 2);
    qcow2_header_release(&h);
    assert_null(h.backing_file);
    qcow2_header_release(&h);
    free(image);
}

static void test_qcow2_header__version_2_has_no_features(void **state)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;
    struct image *image;
    struct qcow2_header h;

    (void)state;
    o.version = 2;
    o.size = DISK_SIZE;
    o.backing_file = "base.img";
    o.backing_format = "qcow2";
    image = image_new(&o);
    must_parse(image, &h);
    assert_int_equal(h.version, 2);
    assert_int_equal(h.refcount_order, 4);
    assert_int_equal(h.header_length, 72);
    /* There lies an extension, which must not be taken for features. */
    assert_int_equal(h.incompatible, 0);
    assert_int_equal(h.compatible, 0);
    assert_int_equal(h.autoclear, 0);
    assert_string_equal(h.backing_file, "base.img");
    assert_string_equal(h.backing_format, "qcow2");
    qcow2_header_release(&h);
    free(image);
}

/* Images of before there were extensions: the name begins where the header ends. */
static void test_qcow2_header__backing_file_without_extensions(void **state)
{
    struct image *image = image_plain();
    struct qcow2_header h;

    (void)state;
    memset(image->bytes + 72, 0, image->len - 72);
    put(image, QCOW2_OFFSET_VERSION, 4, 2);
    put(image, QCOW2_OFFSET_BACKING_FILE_OFFSET, 8, 72);
    put(image, QCOW2_OFFSET_BACKING_FILE_SIZE, 4, 3);
    memcpy(image->bytes + 72, "abcdefgh\xff\xff\xff\xff\xff\xff\xff\xff", 16);
    must_parse(image, &h);
    assert_string_equal(h.backing_file, "abc");
    assert_null(h.backing_format);
    assert_int_equal(h.extension_count, 0);
    qcow2_header_release(&h);
    free(image);
}

static void test_qcow2_header__backing_file_of_1023_bytes_at_the_very_end(void **state)
{
    struct image *image = image_plain();
    struct qcow2_header h;

    (void)state;
    put(image, QCOW2_OFFSET_BACKING_FILE_OFFSET, 8, 65536 - 1023);
    put(image, QCOW2_OFFSET_BACKING_FILE_SIZE, 4, 1023);
    memset(image->bytes + 65536 - 1023, 'n', 1023);
    must_parse(image, &h);
    assert_int_equal(strlen(h.backing_file), 1023);
    qcow2_header_release(&h);
    free(image);
}

/* ---- what is no qcow2 image ---- */

static void test_qcow2_header__not_qcow2(void **state)
{
    struct image *image = image_plain();

    (void)state;
    image->len = 0;
    image->file_size = 0;
    must_refuse(image, EINVAL, "node 'x': not a qcow2 image: the file is empty");

    image = image_plain();
    image->len = image->file_size = 3;
    must_refuse(image, EINVAL,
                "node 'x': not a qcow2 image: the file has 3 bytes, a header has 72 at least");

    image = image_plain();
    image->len = image->file_size = 71;
    must_refuse(image, EINVAL,
                "node 'x': not a qcow2 image: the header is cut short: the file has 71 bytes, a "
                "header 72 at least");

    image = image_plain();
    memcpy(image->bytes, "QFI\xfa", 4);
    must_refuse(image, EINVAL,
                "node 'x': not a qcow2 image: it begins with 0x514649fa, expected 0x514649fb");

    image = image_plain();
    memset(image->bytes, 0, 512);
    must_refuse(image, EINVAL,
                "node 'x': not a qcow2 image: it begins with 0x00000000, expected 0x514649fb");
}

/* However short the file is, it is refused, without a look beyond its end. */
static void test_qcow2_header__cut_short_anywhere(void **state)
{
    (void)state;
    for (size_t len = 0; len < 1200; len++) {
        struct image *image = image_backed();
        struct error *err = NULL;
        struct qcow2_header h;

        image->len = image->file_size = len;
        assert_int_equal(parse(image, &h, &err), -EINVAL);
        assert_non_null(strstr(error_text(err), "node 'x': "));
        error_free(&err);
        free(image);
    }
}

/* ---- single fields ---- */

struct poke {
    size_t offset;
    unsigned width;
    uint64_t value;
    int errnum;
    const char *message;
};

static const struct poke pokes[] = {
    {QCOW2_OFFSET_VERSION, 4, 1, ENOTSUP, "version is 1, this program reads 2 and 3"},
    {QCOW2_OFFSET_VERSION, 4, 4, ENOTSUP, "version is 4, this program reads 2 and 3"},
    {QCOW2_OFFSET_CLUSTER_BITS, 4, 8, EINVAL, "cluster_bits is 8, expected 9 to 21"},
    {QCOW2_OFFSET_CLUSTER_BITS, 4, 22, EINVAL, "cluster_bits is 22, expected 9 to 21"},
    {QCOW2_OFFSET_CLUSTER_BITS, 4, 0x80000010, EINVAL,
     "cluster_bits is 2147483664, expected 9 to 21"},
    {QCOW2_OFFSET_SIZE, 8, UINT64_MAX, EINVAL,
     "size is 18446744073709551615 bytes, expected 9223372035781033984 at most"},
    {QCOW2_OFFSET_SIZE, 8, (uint64_t)NODE_SIZE_MAX + 1, EINVAL,
     "size is 9223372035781033985 bytes, expected 9223372035781033984 at most"},
    {QCOW2_OFFSET_SIZE, 8, NODE_SIZE_MAX, EINVAL,
     "the L1 table has 2 entries, a disk of 9223372035781033984 bytes needs 17179869182"},
    {QCOW2_OFFSET_CRYPT_METHOD, 4, 3, EINVAL, "crypt_method is 3, expected 0 to 2"},
    {QCOW2_OFFSET_L1_SIZE, 4, 1, EINVAL,
     "the L1 table has 1 entries, a disk of 1073741824 bytes needs 2"},
    {QCOW2_OFFSET_L1_SIZE, 4, 4194305, EINVAL,
     "the L1 table has 4194305 entries, expected 4194304 at most"},
    {QCOW2_OFFSET_L1_SIZE, 4, 8193, EINVAL,
     "the L1 table is at offset 196608 and has 65544 bytes, but the file has only 262144"},
    {QCOW2_OFFSET_L1_OFFSET, 8, 0, EINVAL, "the L1 table is at offset 0, where the header is"},
    {QCOW2_OFFSET_L1_OFFSET, 8, 0x30200, EINVAL,
     "the L1 table is at offset 197120, expected a multiple of 65536"},
    {QCOW2_OFFSET_L1_OFFSET, 8, 0x40000, EINVAL,
     "the L1 table is at offset 262144 and has 16 bytes, but the file has only 262144"},
    {QCOW2_OFFSET_L1_OFFSET, 8, 0xffffffffffff0000, EINVAL,
     "the L1 table is at offset 18446744073709486080 and has 16 bytes, but the file has only "
     "262144"},
    {QCOW2_OFFSET_L1_OFFSET, 8, 0x10000, EINVAL,
     "the refcount table at offset 65536 and the L1 table at offset 65536 overlap"},
    {QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, 8, 0, EINVAL,
     "the refcount table is at offset 0, where the header is"},
    {QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, 8, 0x10008, EINVAL,
     "the refcount table is at offset 65544, expected a multiple of 65536"},
    {QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, 8, 0x40000, EINVAL,
     "the refcount table is at offset 262144 and has 65536 bytes, but the file has only 262144"},
    {QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, 8, 0xffffffffffff0000, EINVAL,
     "the refcount table is at offset 18446744073709486080 and has 65536 bytes, but the file has "
     "only 262144"},
    {QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS, 4, 0, EINVAL,
     "the refcount table has 0 clusters, expected 1 to 128"},
    {QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS, 4, 129, EINVAL,
     "the refcount table has 129 clusters, expected 1 to 128"},
    {QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS, 4, 3, EINVAL,
     "the refcount table at offset 65536 and the L1 table at offset 196608 overlap"},
    {QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS, 4, 4, EINVAL,
     "the refcount table is at offset 65536 and has 262144 bytes, but the file has only 262144"},
    {QCOW2_OFFSET_SNAPSHOT_COUNT, 4, 65537, EINVAL,
     "there are 65537 snapshots, expected 65536 at most"},
    {QCOW2_OFFSET_SNAPSHOT_COUNT, 4, 1, EINVAL,
     "the snapshot table is at offset 0, where the header is"},
    {QCOW2_OFFSET_REFCOUNT_ORDER, 4, 7, EINVAL, "refcount_order is 7, expected 6 at most"},
    {QCOW2_OFFSET_REFCOUNT_ORDER, 4, 0x100, EINVAL, "refcount_order is 256, expected 6 at most"},
    {QCOW2_OFFSET_HEADER_LENGTH, 4, 96, EINVAL,
     "header_length is 96, expected 104 or more, a multiple of 8"},
    {QCOW2_OFFSET_HEADER_LENGTH, 4, 109, EINVAL,
     "header_length is 109, expected 104 or more, a multiple of 8"},
    {QCOW2_OFFSET_HEADER_LENGTH, 4, 65544, EINVAL,
     "header_length is 65544, but a cluster has 65536 bytes, of which the file has 65536 that a "
     "header may be in"},
    {QCOW2_OFFSET_COMPRESSION_TYPE, 1, 1, EINVAL,
     "compression_type is 1, expected 0 without incompatible feature 3"},
    {QCOW2_OFFSET_INCOMPATIBLE, 8, QCOW2_INCOMPATIBLE_COMPRESSION_TYPE, EINVAL,
     "incompatible feature 3 announces a compression type, but there is none"},
    {QCOW2_OFFSET_AUTOCLEAR, 8, QCOW2_AUTOCLEAR_BITMAPS, EINVAL,
     "autoclear feature 0 announces bitmaps, but there is no such extension"},
    {QCOW2_OFFSET_BACKING_FILE_OFFSET, 8, 104, EINVAL,
     "the backing file name is at offset 104, within the header, which has 112 bytes"},
    {QCOW2_OFFSET_BACKING_FILE_OFFSET, 8, 1024, EINVAL,
     "the backing file name has 0 bytes, expected 1 to 1023"},
};

static void test_qcow2_header__each_field_is_checked(void **state)
{
    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(pokes); i++) {
        struct image *image = image_plain();
        char *message = xasprintf("node 'x': qcow2 header: %s", pokes[i].message);

        put(image, pokes[i].offset, pokes[i].width, pokes[i].value);
        must_refuse(image, pokes[i].errnum, message);
        free(message);
    }
}

/* A table ends where the file ends, or it does not fit; nothing wraps at 2^64. */
static void test_qcow2_header__tables_lie_in_the_file(void **state)
{
    struct image *image = image_plain();
    struct qcow2_header h;

    (void)state;
    image->file_size = 0x30010;
    must_parse(image, &h);
    qcow2_header_release(&h);
    image->file_size--;
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the L1 table is at offset 196608 and has 16 bytes, but "
                "the file has only 196623");
}

/* An L1 table of few entries owns its last cluster all the same. */
static void test_qcow2_header__tables_share_no_cluster(void **state)
{
    struct image *image = image_plain();

    (void)state;
    put(image, QCOW2_OFFSET_SNAPSHOT_COUNT, 4, 2);
    put(image, QCOW2_OFFSET_SNAPSHOTS_OFFSET, 8, 0x30000);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the L1 table at offset 196608 and the snapshot table at "
                "offset 196608 overlap");
}

static void test_qcow2_header__snapshot_table_has_its_least_length(void **state)
{
    struct image *image = image_plain();
    struct qcow2_header h;

    (void)state;
    image->file_size = 0x40000 + 80;
    put(image, QCOW2_OFFSET_SNAPSHOT_COUNT, 4, 2);
    put(image, QCOW2_OFFSET_SNAPSHOTS_OFFSET, 8, 0x40000);
    must_parse(image, &h);
    assert_int_equal(h.snapshot_count, 2);
    assert_int_equal(h.snapshots_offset, 0x40000);
    qcow2_header_release(&h);
    image->file_size--;
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the snapshot table is at offset 262144 and has 80 bytes, "
                "but the file has only 262223");
}

static void test_qcow2_header__disk_without_a_byte_needs_no_l1_table(void **state)
{
    struct image *image = image_plain();
    struct qcow2_header h;

    (void)state;
    put(image, QCOW2_OFFSET_SIZE, 8, 0);
    put(image, QCOW2_OFFSET_L1_SIZE, 4, 0);
    put(image, QCOW2_OFFSET_L1_OFFSET, 8, 0);
    must_parse(image, &h);
    assert_int_equal(h.size, 0);
    qcow2_header_release(&h);
    free(image);
}

static void test_qcow2_header__l1_entries_for_a_size(void **state)
{
    (void)state;
    assert_int_equal(qcow2_l1_entries_needed(0, 16, false), 0);
    assert_int_equal(qcow2_l1_entries_needed(1, 16, false), 1);
    assert_int_equal(qcow2_l1_entries_needed(512 * MIB, 16, false), 1);
    assert_int_equal(qcow2_l1_entries_needed(512 * MIB + 1, 16, false), 2);
    assert_int_equal(qcow2_l1_entries_needed(512 * MIB, 16, true), 2);
    assert_int_equal(qcow2_l1_entries_needed(32 * KIB, 9, false), 1);
    assert_int_equal(qcow2_l1_entries_needed(UINT64_MAX, 9, false), (uint64_t)1 << 49);
}

/* ---- backing file ---- */

static void test_qcow2_header__backing_file_name_is_checked(void **state)
{
    struct image *image = image_backed();
    size_t at = (size_t)load_be64(image->bytes + QCOW2_OFFSET_BACKING_FILE_OFFSET);

    (void)state;
    image->bytes[at + 4] = '\0';
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the backing file name, of 8 bytes, contains a NUL byte");

    image = image_backed();
    put(image, QCOW2_OFFSET_BACKING_FILE_SIZE, 4, 1024);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the backing file name has 1024 bytes, expected 1 to 1023");

    image = image_backed();
    put(image, QCOW2_OFFSET_BACKING_FILE_OFFSET, 8, 65530);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the backing file name is at offset 65530 and has 8 bytes, "
                "expected to end within the first 65536");

    image = image_backed();
    put(image, QCOW2_OFFSET_BACKING_FILE_OFFSET, 8, UINT64_MAX - 3);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the backing file name is at offset 18446744073709551612 "
                "and has 8 bytes, expected to end within the first 65536");

    image = image_backed();
    image->bytes[112 + 8 + 1] = '\0';
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the backing format name, of 3 bytes, contains a NUL byte");
}

/* With larger clusters we read no further than 64 KiB, and say so. */
static void test_qcow2_header__nothing_is_read_beyond_64_kib(void **state)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;
    struct image *image;

    (void)state;
    o.cluster_bits = 21;
    o.size = DISK_SIZE;
    image = image_new(&o);
    put(image, QCOW2_OFFSET_BACKING_FILE_OFFSET, 8, 65532);
    put(image, QCOW2_OFFSET_BACKING_FILE_SIZE, 4, 5);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the backing file name is at offset 65532 and has 5 bytes, "
                "expected to end within the first 65536");

    image = image_new(&o);
    put(image, QCOW2_OFFSET_HEADER_LENGTH, 4, 65536);
    must_refuse(
        image, EINVAL,
        "node 'x': qcow2 header: the header extensions have no end within the first 65536 bytes");
}

/* ---- extensions ---- */

/* Puts an extension at *at and the end marker behind it. */
static void add_extension(struct image *image, size_t *at, uint32_t type, const void *data,
                          size_t len)
{
    store_be32(image->bytes + *at, type);
    store_be32(image->bytes + *at + 4, (uint32_t)len);
    memcpy(image->bytes + *at + 8, data, len);
    *at += 8 + align_up(len, 8);
    memset(image->bytes + *at, 0, 8);
}

static void test_qcow2_header__extensions_are_kept_as_they_are(void **state)
{
    struct image *image = image_plain();
    struct qcow2_header h;
    size_t at = 112;

    (void)state;
    add_extension(image, &at, 0x12345678, "hello", 5);
    add_extension(image, &at, QCOW2_EXTENSION_BACKING_FORMAT, "vmdk", 4);
    add_extension(image, &at, 0x12345678, "", 0); /* unknown: how often is not for us to say */
    add_extension(image, &at, 0x9abcdef0, "0123456789abcdef", 16);
    must_parse(image, &h);
    assert_int_equal(h.extension_count, 4);
    assert_int_equal(h.extensions[0].type, 0x12345678);
    assert_int_equal(h.extensions[0].len, 5);
    assert_memory_equal(h.extensions[0].data, "hello", 5);
    assert_int_equal(h.extensions[1].type, QCOW2_EXTENSION_BACKING_FORMAT);
    assert_int_equal(h.extensions[2].len, 0);
    assert_int_equal(h.extensions[3].type, 0x9abcdef0);
    assert_memory_equal(h.extensions[3].data, "0123456789abcdef", 16);
    assert_string_equal(h.backing_format, "vmdk");
    assert_null(h.backing_file);
    assert_int_equal(h.bytes_len, at);
    assert_memory_equal(h.bytes, image->bytes, at);
    qcow2_header_release(&h);
    free(image);
}

/* The last extension may end with the cluster, its padding cut off, and no end marker. */
static void test_qcow2_header__extensions_fill_the_cluster(void **state)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;
    struct image *image;
    struct qcow2_header h;

    (void)state;
    o.cluster_bits = 9;
    o.size = 1 * MIB;
    image = image_new(&o);
    image->len = 512;
    put(image, 112, 4, 0x12345678);
    put(image, 116, 4, 512 - 120);
    must_parse(image, &h);
    assert_int_equal(h.extension_count, 1);
    assert_int_equal(h.extensions[0].len, 392);
    qcow2_header_release(&h);

    put(image, 116, 4, 512 - 120 - 3);
    must_parse(image, &h);
    assert_int_equal(h.extension_count, 1);
    assert_int_equal(h.bytes_len, 512);
    qcow2_header_release(&h);

    put(image, 116, 4, 512 - 120 + 1);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: header extension 0x12345678 at offset 112 has 393 bytes, "
                "expected 392 at most");
}

static void test_qcow2_header__extensions_are_checked(void **state)
{
    struct image *image = image_plain();
    size_t at = 112;

    (void)state;
    put(image, 112, 4, 0x12345678);
    put(image, 116, 4, UINT32_MAX);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: header extension 0x12345678 at offset 112 has 4294967295 "
                "bytes, expected 65416 at most");

    /* The area ends where the backing file's name begins. */
    image = image_backed();
    put(image, QCOW2_OFFSET_BACKING_FILE_OFFSET, 8, 122);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: header extension 0xe2792aca at offset 112 has 3 bytes, "
                "expected 2 at most");

    image = image_plain();
    add_extension(image, &at, QCOW2_EXTENSION_BACKING_FORMAT, "raw", 3);
    add_extension(image, &at, QCOW2_EXTENSION_BACKING_FORMAT, "raw", 3);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: header extension 0xe2792aca is there 2 times, expected "
                "one");

    image = image_plain();
    at = 112;
    memset(image->bytes + 112, 'r', 300);
    put(image, 112, 4, QCOW2_EXTENSION_BACKING_FORMAT);
    put(image, 116, 4, 256);
    memset(image->bytes + 120 + 256, 0, 400);
    must_refuse(
        image, EINVAL,
        "node 'x': qcow2 header: the backing format name has 256 bytes, expected 255 at most");
}

/* The largest number of them that there can be. */
static void test_qcow2_header__eight_thousand_extensions(void **state)
{
    struct image *image = image_plain();
    struct qcow2_header h;

    (void)state;
    for (size_t at = 112; at < 65536; at += 8)
        put(image, at, 8, UINT64_C(0x1234567800000000));
    must_parse(image, &h);
    assert_int_equal(h.extension_count, (65536 - 112) / 8);
    qcow2_header_release(&h);
    free(image);
}

static struct image *image_with_bitmaps(uint32_t count, uint32_t reserved, uint64_t size,
                                        uint64_t offset)
{
    struct image *image = image_plain();
    uint8_t data[QCOW2_BITMAPS_LEN];
    size_t at = 112;

    image->file_size = 0x50000;
    put(image, QCOW2_OFFSET_AUTOCLEAR, 8, QCOW2_AUTOCLEAR_BITMAPS);
    store_be32(data + QCOW2_BITMAPS_COUNT, count);
    store_be32(data + QCOW2_BITMAPS_RESERVED, reserved);
    store_be64(data + QCOW2_BITMAPS_DIRECTORY_SIZE, size);
    store_be64(data + QCOW2_BITMAPS_DIRECTORY_OFFSET, offset);
    add_extension(image, &at, QCOW2_EXTENSION_BITMAPS, data, sizeof(data));
    return image;
}

static void test_qcow2_header__bitmaps_extension(void **state)
{
    struct image *image = image_with_bitmaps(2, 0, 64, 0x40000);
    struct qcow2_header h;

    (void)state;
    must_parse(image, &h);
    assert_true(h.has_bitmaps);
    assert_int_equal(h.bitmap_count, 2);
    assert_int_equal(h.bitmap_directory_size, 64);
    assert_int_equal(h.bitmap_directory_offset, 0x40000);
    qcow2_header_release(&h);
    put(image, 116, 4, 20);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the bitmaps extension has 20 bytes, expected 24");
    must_refuse(image_with_bitmaps(0, 0, 64, 0x40000), EINVAL,
                "node 'x': qcow2 header: there are 0 bitmaps, expected 1 to 65535");
    must_refuse(image_with_bitmaps(65536, 0, 64, 0x40000), EINVAL,
                "node 'x': qcow2 header: there are 65536 bitmaps, expected 1 to 65535");
    must_refuse(image_with_bitmaps(2, 5, 64, 0x40000), EINVAL,
                "node 'x': qcow2 header: the reserved field of the bitmaps extension is "
                "0x00000005, expected 0");
    must_refuse(image_with_bitmaps(2, 0, 47, 0x40000), EINVAL,
                "node 'x': qcow2 header: the directory of 2 bitmaps has 47 bytes, expected 48 to "
                "67108864");
    must_refuse(image_with_bitmaps(2, 0, UINT64_MAX, 0x40000), EINVAL,
                "node 'x': qcow2 header: the directory of 2 bitmaps has 18446744073709551615 "
                "bytes, expected 48 to 67108864");
    must_refuse(image_with_bitmaps(2, 0, 64, 0x40001), EINVAL,
                "node 'x': qcow2 header: the bitmap directory is at offset 262145, expected a "
                "multiple of 65536");
    must_refuse(image_with_bitmaps(2, 0, 64, 0x50000), EINVAL,
                "node 'x': qcow2 header: the bitmap directory is at offset 327680 and has 64 "
                "bytes, but the file has only 327680");
    must_refuse(image_with_bitmaps(2, 0, 64, 0x30000), EINVAL,
                "node 'x': qcow2 header: the L1 table at offset 196608 and the bitmap directory at "
                "offset 196608 overlap");

    /* Others have written since: what it says is not looked at. */
    image = image_with_bitmaps(0, 7, UINT64_MAX, 5);
    put(image, QCOW2_OFFSET_AUTOCLEAR, 8, 0);
    must_parse(image, &h);
    assert_false(h.has_bitmaps);
    assert_int_equal(h.extension_count, 1);
    qcow2_header_release(&h);
    free(image);
}

/* ---- names of features ---- */

static void test_qcow2_header__feature_names_come_from_the_image(void **state)
{
    struct image *image = image_plain();
    uint8_t table[3 * QCOW2_FEATURE_ENTRY_LEN + 5] = {0};
    char buf[QCOW2_FEATURE_NAME_LEN + 1];
    struct qcow2_header h;
    size_t at = 112;

    (void)state;
    must_parse(image, &h); /* with the names that we write ourselves */
    assert_string_equal(qcow2_header_feature_name(&h, QCOW2_FEATURE_INCOMPATIBLE, 0, buf),
                        "dirty bit");
    assert_string_equal(qcow2_header_feature_name(&h, QCOW2_FEATURE_AUTOCLEAR, 1, buf),
                        "raw external data");
    assert_null(qcow2_header_feature_name(&h, QCOW2_FEATURE_COMPATIBLE, 1, buf));
    qcow2_header_release(&h);

    table[1] = 40;
    memset(table + 2, 'n', QCOW2_FEATURE_NAME_LEN); /* no NUL at its end */
    table[QCOW2_FEATURE_ENTRY_LEN + 1] = 41;
    memcpy(table + QCOW2_FEATURE_ENTRY_LEN + 2, "a\n\x1b[1m\xff'", 8);
    table[2 * QCOW2_FEATURE_ENTRY_LEN + 1] = 42;
    add_extension(image, &at, QCOW2_EXTENSION_FEATURE_NAMES, table, sizeof(table));
    must_parse(image, &h);
    assert_int_equal(strlen(qcow2_header_feature_name(&h, QCOW2_FEATURE_INCOMPATIBLE, 40, buf)),
                     46);
    assert_string_equal(qcow2_header_feature_name(&h, QCOW2_FEATURE_INCOMPATIBLE, 41, buf),
                        "a??[1m?'");
    assert_null(qcow2_header_feature_name(&h, QCOW2_FEATURE_INCOMPATIBLE, 42, buf));
    assert_null(qcow2_header_feature_name(&h, QCOW2_FEATURE_COMPATIBLE, 40, buf));
    qcow2_header_release(&h);
    free(image);
}

/* ---- what is supported ---- */

/* `message` NULL: it is supported. Releases the header. */
static void check_supported(struct qcow2_header *h, bool read_only, const char *message)
{
    struct error *err = NULL;
    int r = qcow2_header_check_supported(h, read_only, "x", &err);

    if (message) {
        assert_int_equal(r, -ENOTSUP);
        assert_string_equal(error_text(err), message);
    } else if (r < 0) {
        fail_msg("%s", error_text(err));
    }
    error_free(&err);
    qcow2_header_release(h);
}

/* Nobody may use such an image. */
static void never_supported(struct image *image, const char *message)
{
    struct qcow2_header h;

    must_parse(image, &h);
    check_supported(&h, false, message);
    must_parse(image, &h);
    check_supported(&h, true, message);
    free(image);
}

/* Such an image may be read. */
static void readable_only(struct image *image, const char *message)
{
    struct qcow2_header h;

    must_parse(image, &h);
    check_supported(&h, false, message);
    must_parse(image, &h);
    check_supported(&h, true, NULL);
    free(image);
}

static struct image *image_incompatible(uint64_t features)
{
    struct image *image = image_plain();

    put(image, QCOW2_OFFSET_INCOMPATIBLE, 8, features);
    return image;
}

static void test_qcow2_header__what_we_make_is_supported(void **state)
{
    struct image *image = image_backed();
    struct qcow2_header h;

    (void)state;
    put(image, QCOW2_OFFSET_COMPATIBLE, 8, UINT64_MAX);
    put(image, QCOW2_OFFSET_AUTOCLEAR, 8, UINT64_MAX & ~QCOW2_AUTOCLEAR_BITMAPS);
    must_parse(image, &h);
    check_supported(&h, false, NULL);
    free(image);
}

static void test_qcow2_header__unknown_incompatible_features_are_refused_by_name(void **state)
{
    struct image *image = image_incompatible(UINT64_C(1) << 5 | UINT64_C(1) << 63);
    uint8_t table[QCOW2_FEATURE_ENTRY_LEN] = {QCOW2_FEATURE_INCOMPATIBLE, 63, 't', 'i', 'm', 'e'};
    size_t at = 112;

    (void)state;
    add_extension(image, &at, QCOW2_EXTENSION_FEATURE_NAMES, table, sizeof(table));
    never_supported(image, "node 'x': the image needs features that this program does not know: "
                           "incompatible feature 5, 63 ('time')");
}

static void test_qcow2_header__what_is_not_done_yet_is_refused_by_name(void **state)
{
    struct image *image;

    (void)state;
    image = image_incompatible(QCOW2_INCOMPATIBLE_COMPRESSION_TYPE);
    put(image, QCOW2_OFFSET_COMPRESSION_TYPE, 1, 200);
    never_supported(image, "node 'x': the image's compression type is 200, only 0 (zlib) and 1 "
                           "(zstd) are supported");
    image = image_plain();
    put(image, QCOW2_OFFSET_CRYPT_METHOD, 4, QCOW2_CRYPT_AES);
    never_supported(image, "node 'x': the image has AES encryption, which is weak, and not "
                           "supported: convert it with qemu-img");
}

/* With an extension that says where the LUKS header is, of which `len` bytes are there. */
static struct image *image_encrypted(uint64_t offset, uint64_t luks_len, size_t len)
{
    struct image *image = image_plain();
    uint8_t place[QCOW2_ENCRYPTION_LEN + 8] = {0};
    size_t at = 112;

    store_be64(place + QCOW2_ENCRYPTION_OFFSET, offset);
    store_be64(place + QCOW2_ENCRYPTION_LENGTH, luks_len);
    put(image, QCOW2_OFFSET_CRYPT_METHOD, 4, QCOW2_CRYPT_LUKS);
    if (len)
        add_extension(image, &at, QCOW2_EXTENSION_ENCRYPTION, place, len);
    return image;
}

static void must_not_find_key(struct image *image, const char *text)
{
    struct error *err = NULL;
    struct qcow2_header h;
    uint64_t offset;
    uint64_t len;

    must_parse(image, &h);
    assert_int_equal(qcow2_header_encryption(&h, 16 * MIB, &offset, &len, &err), -EINVAL);
    if (!strstr(error_text(err), text))
        fail_msg("'%s' does not say '%s'", error_text(err), text);
    error_free(&err);
    qcow2_header_release(&h);
    free(image);
}

static void test_qcow2_header__place_of_the_luks_header(void **state)
{
    struct image *image = image_encrypted(8 * MIB, 2 * MIB, QCOW2_ENCRYPTION_LEN);
    struct error *err = NULL;
    struct qcow2_header h;
    uint64_t l1;
    uint64_t offset;
    uint64_t len;

    (void)state;
    must_parse(image, &h);
    assert_int_equal(qcow2_header_encryption(&h, 16 * MIB, &offset, &len, &err), 0);
    assert_int_equal(offset, 8 * MIB);
    assert_int_equal(len, 2 * MIB);
    l1 = h.l1_offset;
    check_supported(&h, false, NULL);
    free(image);
    must_not_find_key(image_encrypted(0, 0, 0), "does not say where its LUKS header is");
    must_not_find_key(image_encrypted(8 * MIB, MIB, QCOW2_ENCRYPTION_LEN + 8), "has 24 bytes");
    must_not_find_key(image_encrypted(8 * MIB, 0, QCOW2_ENCRYPTION_LEN), "has 0 bytes");
    must_not_find_key(image_encrypted(8 * MIB, UINT64_MAX, QCOW2_ENCRYPTION_LEN), "expected 1 to");
    must_not_find_key(image_encrypted(8 * MIB + 512, MIB, QCOW2_ENCRYPTION_LEN), "a multiple of");
    must_not_find_key(image_encrypted(0, MIB, QCOW2_ENCRYPTION_LEN), "where the header is");
    must_not_find_key(image_encrypted(15 * MIB, 2 * MIB, QCOW2_ENCRYPTION_LEN),
                      "the file has only");
    must_not_find_key(image_encrypted(UINT64_MAX << 16, MIB, QCOW2_ENCRYPTION_LEN),
                      "the file has only");
    must_not_find_key(image_encrypted(l1, MIB, QCOW2_ENCRYPTION_LEN), "overlap");
}

static void test_qcow2_header__extended_l2_entries_halve_what_an_l1_entry_covers(void **state)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;
    struct image *image = image_incompatible(QCOW2_INCOMPATIBLE_EXTENDED_L2);

    (void)state;
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the L1 table has 2 entries, a disk of 1073741824 bytes "
                "needs 4");
    o.cluster_bits = 13;
    image = image_new(&o);
    put(image, QCOW2_OFFSET_INCOMPATIBLE, 8, QCOW2_INCOMPATIBLE_EXTENDED_L2);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: cluster_bits is 13, expected 14 or more with extended L2 "
                "entries");
}

static void test_qcow2_header__data_file(void **state)
{
    struct qcow2_header h;
    struct image *image = image_incompatible(QCOW2_INCOMPATIBLE_DATA_FILE);
    static const char long_name[QCOW2_DATA_FILE_MAX + 1] = {'x'};
    size_t at = 112;

    (void)state;
    must_parse(image, &h);
    assert_true(qcow2_header_has_data_file(&h));
    assert_null(h.data_file); /* whoever opens it says where it is */
    check_supported(&h, false, NULL);

    add_extension(image, &at, QCOW2_EXTENSION_DATA_FILE, "disk.raw", 8);
    put(image, QCOW2_OFFSET_AUTOCLEAR, 8, QCOW2_AUTOCLEAR_RAW_DATA);
    must_parse(image, &h);
    assert_string_equal(h.data_file, "disk.raw");
    assert_true(qcow2_header_data_is_raw(&h));
    qcow2_header_release(&h);

    put(image, QCOW2_OFFSET_INCOMPATIBLE, 8, 0); /* then it says nothing */
    must_parse(image, &h);
    assert_null(h.data_file);
    assert_false(qcow2_header_data_is_raw(&h));
    qcow2_header_release(&h);
    free(image);

    image = image_incompatible(QCOW2_INCOMPATIBLE_DATA_FILE);
    at = 112;
    add_extension(image, &at, QCOW2_EXTENSION_DATA_FILE, "disk\0raw", 8);
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the data file name, of 8 bytes, contains a NUL byte");
    image = image_incompatible(QCOW2_INCOMPATIBLE_DATA_FILE);
    at = 112;
    add_extension(image, &at, QCOW2_EXTENSION_DATA_FILE, long_name, sizeof(long_name));
    must_refuse(image, EINVAL,
                "node 'x': qcow2 header: the data file name has 1024 bytes, expected 1023 at most");
}

static void test_qcow2_header__some_images_are_read_only(void **state)
{
    struct image *image = image_incompatible(QCOW2_INCOMPATIBLE_DATA_FILE);

    (void)state;
    put(image, QCOW2_OFFSET_SNAPSHOT_COUNT, 4, 1);
    image->file_size += 65536;
    put(image, QCOW2_OFFSET_SNAPSHOTS_OFFSET, 8, 65536 * 4);
    readable_only(image, "node 'x': the image has internal snapshots beside an external data file, "
                         "which cannot keep what they hold: open it with read-only=on");
    readable_only(image_incompatible(QCOW2_INCOMPATIBLE_CORRUPT | QCOW2_INCOMPATIBLE_DIRTY),
                  "node 'x': the image is marked corrupt: open it with read-only=on, or repair it "
                  "with `cairn check -r all`");
}

/* Bitmaps in the image are not kept up to date: their bit goes when the image is written to. */
static void test_qcow2_header__no_autoclear_feature_is_kept(void **state)
{
    (void)state;
    assert_int_equal(qcow2_header_autoclear_kept(), 0);
}

/* ---- memory, and anything at all ---- */

static void test_qcow2_header__no_memory_is_an_error(void **state)
{
    struct image *image = image_backed();
    unsigned k;

    (void)state;
    for (k = 1;; k++) {
        struct error *err = NULL;
        struct qcow2_header h;
        int r;

        (void)alloc_fail_at(k);
        r = parse(image, &h, &err);
        (void)alloc_fail_at(0);
        if (r == 0) {
            qcow2_header_release(&h);
            break;
        }
        assert_int_equal(r, -ENOMEM);
        error_free(&err);
    }
    assert_int_equal(k, 5); /* bytes, extensions, two strings */
    free(image);
}

static void check_promises(const struct qcow2_header *h, uint64_t file_size)
{
    uint64_t cluster_size = qcow2_header_cluster_size(h);
    uint64_t refcounts = (uint64_t)h->refcount_table_clusters << h->cluster_bits;

    assert_in_range(h->cluster_bits, 9, 21);
    assert_true(h->refcount_order <= 6);
    assert_true(h->size <= NODE_SIZE_MAX);
    assert_true(range_within(h->refcount_table_offset, refcounts, file_size));
    assert_true(h->refcount_table_offset >= cluster_size);
    assert_true(is_aligned(h->refcount_table_offset, cluster_size));
    if (h->l1_size > 0) {
        assert_true(range_within(h->l1_offset, (uint64_t)h->l1_size * 8, file_size));
        assert_true(h->l1_offset >= cluster_size && is_aligned(h->l1_offset, cluster_size));
        assert_false(ranges_overlap(h->l1_offset, (uint64_t)h->l1_size * 8,
                                    h->refcount_table_offset, refcounts));
    }
}

/* Headers with a few wrong bits: refused with a message, or the promises hold. */
static void test_qcow2_header__wrong_bits(void **state)
{
    struct image *image = image_backed();
    struct image *twisted = xnew(struct image);

    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};

        for (unsigned n = 0; n < 20; n++) {
            struct error *err = NULL;
            struct qcow2_header h;

            *twisted = *image;
            for (uint64_t flips = 1 + prng_below(&prng, 3); flips > 0; flips--)
                twisted->bytes[prng_below(&prng, 700)] ^= (uint8_t)(1u << prng_below(&prng, 8));
            if (parse(twisted, &h, &err) == 0) {
                check_promises(&h, twisted->file_size);
                qcow2_header_release(&h);
            } else {
                assert_true(strlen(error_text(err)) > 20);
                error_free(&err);
            }
        }
    }
    free(twisted);
    free(image);
}
