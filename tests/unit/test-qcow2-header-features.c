/* SPDX-License-Identifier: Apache-2.0 */
/* Extensions and features in the header of qcow2 images: what is read from them, what is refused, and what is supported. */
#include "base/checked.h"
#include "qcow2-header-fixture.h"

#include <errno.h>

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

static void test_qcow2_header_features__extensions_are_kept_as_they_are(void **state)
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
static void test_qcow2_header_features__extensions_fill_the_cluster(void **state)
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

static void test_qcow2_header_features__extensions_are_checked(void **state)
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
static void test_qcow2_header_features__eight_thousand_extensions(void **state)
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

static void test_qcow2_header_features__bitmaps_extension(void **state)
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

static void test_qcow2_header_features__feature_names_come_from_the_image(void **state)
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

static void test_qcow2_header_features__what_we_make_is_supported(void **state)
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

static void
test_qcow2_header_features__unknown_incompatible_features_are_refused_by_name(void **state)
{
    struct image *image = image_incompatible(UINT64_C(1) << 5 | UINT64_C(1) << 63);
    uint8_t table[QCOW2_FEATURE_ENTRY_LEN] = {QCOW2_FEATURE_INCOMPATIBLE, 63, 't', 'i', 'm', 'e'};
    size_t at = 112;

    (void)state;
    add_extension(image, &at, QCOW2_EXTENSION_FEATURE_NAMES, table, sizeof(table));
    never_supported(image, "node 'x': the image needs features that this program does not know: "
                           "incompatible feature 5, 63 ('time')");
}

static void test_qcow2_header_features__what_is_not_done_yet_is_refused_by_name(void **state)
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

static void test_qcow2_header_features__place_of_the_luks_header(void **state)
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

static void
test_qcow2_header_features__extended_l2_entries_halve_what_an_l1_entry_covers(void **state)
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

static void test_qcow2_header_features__data_file(void **state)
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

static void test_qcow2_header_features__some_images_are_read_only(void **state)
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
static void test_qcow2_header_features__no_autoclear_feature_is_kept(void **state)
{
    (void)state;
    assert_int_equal(qcow2_header_autoclear_kept(), 0);
}
