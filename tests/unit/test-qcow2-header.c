/* SPDX-License-Identifier: Apache-2.0 */
/* The header of qcow2 images: its fields and the backing file's name, and each thing that is refused, with its message. */
#include "base/checked.h"
#include "base/prng.h"
#include "graph/node.h"
#include "qcow2-header-fixture.h"
#include "seeds.h"

#include <errno.h>

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
