/* SPDX-License-Identifier: Apache-2.0 */
/* vhdx: what images show, which are refused, and what a log changes. */
#include "base/crc32c.h"
#include "import-fixture.h"

#define HEADER  ((size_t)128 << 10) /* the newer one */
#define REGIONS ((size_t)192 << 10)

static void test_vhdx__crc32c_is_castagnolis(void **state)
{
    (void)state;
    assert_int_equal(crc32c(0, "123456789", 9), 0xe3069283);
    assert_int_equal(crc32c(crc32c(0, "1234", 4), "56789", 5), 0xe3069283);
    assert_int_equal(crc32c(0, "", 0), 0);
}

static void must_show(bool dirty)
{
    struct image_bytes i = vhdx_make(dirty);

    import_must_show("vhdx", &i);
    image_bytes_free(&i);
}

static void test_vhdx__images_show_their_blocks(void **state)
{
    (void)state;
    must_show(false);
}

static void test_vhdx__a_log_is_replayed_in_memory(void **state)
{
    struct image_bytes i = vhdx_make(true);
    uint8_t *before = xalloc(i.len, 1);

    (void)state;
    memcpy(before, i.bytes, i.len);
    import_must_show("vhdx", &i);
    assert_memory_equal(before, i.bytes, i.len);
    free(before);
    image_bytes_free(&i);
}

/* ---- one field each ---- */

static void put(uint8_t *at, unsigned width, uint64_t value)
{
    if (width == 8)
        store_le64(at, value);
    else if (width == 4)
        store_le32(at, (uint32_t)value);
    else
        store_le16(at, (uint16_t)value);
}

static struct image_bytes with(size_t at, unsigned width, uint64_t value)
{
    struct image_bytes i = vhdx_make(false);

    put(i.bytes + at, width, value);
    return i;
}

static struct image_bytes with_header(bool dirty, size_t at, unsigned width, uint64_t value)
{
    struct image_bytes i = vhdx_make(dirty);

    put(i.bytes + HEADER + at, width, value);
    vhdx_make_sum(i.bytes + HEADER, 4096);
    return i;
}

static struct image_bytes with_regions(size_t at, unsigned width, uint64_t value)
{
    struct image_bytes i = vhdx_make(false);

    put(i.bytes + REGIONS + at, width, value);
    vhdx_make_sum(i.bytes + REGIONS, 65536);
    return i;
}

static void test_vhdx__one_sound_copy_is_enough(void **state)
{
    static const size_t places[] = {64 << 10, 128 << 10, 192 << 10, 256 << 10};

    (void)state;
    for (size_t k = 0; k < ARRAY_SIZE(places); k++) {
        struct image_bytes i = vhdx_make(false);

        i.bytes[places[k] + 100] ^= 1;
        import_must_show("vhdx", &i);
        image_bytes_free(&i);
    }
}

static void test_vhdx__refuses_damaged_headers(void **state)
{
    struct image_bytes i = vhdx_make(false);

    (void)state;
    import_must_refuse("vhdx", with(0, 4, 0), EINVAL, "node 'd': this is no VHDX image");
    i.bytes[(64 << 10) + 100] ^= 1;
    i.bytes[(128 << 10) + 100] ^= 1;
    import_must_refuse("vhdx", i, EINVAL, "neither of the two headers is sound");
    i = vhdx_make(false);
    i.bytes[(192 << 10) + 100] ^= 1;
    i.bytes[(256 << 10) + 100] ^= 1;
    import_must_refuse("vhdx", i, EINVAL, "neither of the two region tables is sound");
    i = vhdx_make(false);
    i.len = 100000;
    import_must_refuse("vhdx", i, EINVAL, "the header would lie at 131072");
    import_must_refuse("vhdx", with_header(false, 66, 2, 2), ENOTSUP,
                       "the image has version 2, and only 1 is read");
    import_must_refuse("vhdx", with_header(true, 64, 2, 1), ENOTSUP,
                       "the log has version 1, and only 0 is read");
}

static void test_vhdx__refuses_regions_that_do_not_fit(void **state)
{
    (void)state;
    import_must_refuse("vhdx", with_regions(8, 4, 2048), EINVAL, "a region table of 2048 entries");
    import_must_refuse("vhdx", with_regions(8, 4, 1), EINVAL, "the image has no metadata");
    import_must_refuse("vhdx", with_regions(8, 4, 0), EINVAL, "the image has no table of blocks");
    import_must_refuse("vhdx", with_regions(16, 4, 1), ENOTSUP, "a region that is not known");
    import_must_refuse("vhdx", with_regions(32, 8, 0), EINVAL,
                       "the table of blocks of 1048576 bytes cannot lie at 0");
    import_must_refuse("vhdx", with_regions(32, 8, (3 << 20) + 4096), EINVAL,
                       "cannot lie at 3149824");
    import_must_refuse("vhdx", with_regions(32, 8, 7 << 20), EINVAL, "cannot lie at 7340032");
    import_must_refuse("vhdx", with_regions(40, 4, 0), EINVAL, "the table of blocks of 0 bytes");
    import_must_refuse("vhdx", with_regions(40, 4, 0xfff00000), EINVAL,
                       "the table of blocks of 4293918720 bytes");
    import_must_refuse("vhdx", with_regions(64, 8, UINT64_MAX << 20), EINVAL,
                       "metadata of 1048576 bytes cannot lie at 18446744073708503040");
}

static void test_vhdx__refuses_metadata_that_it_does_not_know(void **state)
{
    (void)state;
    import_must_refuse("vhdx", with(VHDX_MAKE_METADATA, 4, 0), EINVAL,
                       "the table of metadata is damaged");
    import_must_refuse("vhdx", with(VHDX_MAKE_METADATA + 10, 2, 2048), EINVAL,
                       "the table of metadata is damaged");
    import_must_refuse("vhdx", with(VHDX_MAKE_METADATA + 10, 2, 2), EINVAL,
                       "the metadata do not say the size of a sector");
    import_must_refuse("vhdx", with(VHDX_MAKE_METADATA + 32 * 5, 4, 0), ENOTSUP,
                       "metadata that are not known");
    import_must_refuse("vhdx", with(VHDX_MAKE_METADATA + 32 + 16, 4, 4096), EINVAL,
                       "the file parameters, of 8 bytes, cannot lie at 4096");
    import_must_refuse("vhdx", with(VHDX_MAKE_METADATA + 32 + 16, 4, (1 << 20) - 7), EINVAL,
                       "cannot lie at 1048569");
    import_must_refuse("vhdx", with(VHDX_MAKE_METADATA + 32 + 20, 4, 16), EINVAL,
                       "the file parameters, of 16 bytes");
    import_must_refuse("vhdx", with(VHDX_MAKE_ITEMS + 4, 4, 2), ENOTSUP,
                       "a difference to another one");
    import_must_refuse("vhdx", with(VHDX_MAKE_ITEMS, 4, 3 << 20), EINVAL,
                       "blocks of 3145728 bytes");
    import_must_refuse("vhdx", with(VHDX_MAKE_ITEMS, 4, 512 << 10), EINVAL,
                       "blocks of 524288 bytes");
    import_must_refuse("vhdx", with(VHDX_MAKE_ITEMS, 4, 512 << 20), EINVAL,
                       "blocks of 536870912 bytes");
    import_must_refuse("vhdx", with(VHDX_MAKE_ITEMS + 32, 4, 1024), EINVAL,
                       "sectors of 1024 bytes");
    import_must_refuse("vhdx", with(VHDX_MAKE_ITEMS + 16, 8, 1000), EINVAL, "a disk of 1000 bytes");
    import_must_refuse("vhdx", with(VHDX_MAKE_ITEMS + 16, 8, ((uint64_t)64 << 40) + 512), EINVAL,
                       "a disk of 70368744178176 bytes");
    import_must_refuse("vhdx", with(VHDX_MAKE_ITEMS + 16, 8, (uint64_t)1 << 40), EINVAL,
                       "a disk of 1048576 blocks, and a table of 1048576 bytes");
}

static void test_vhdx__blocks_beyond_the_end_are_damage(void **state)
{
    (void)state;
    import_must_fail_reads("vhdx", with(VHDX_MAKE_BAT, 8, 7 << 20 | 6));
    import_must_fail_reads("vhdx", with(VHDX_MAKE_BAT, 8, UINT64_MAX << 20 | 6));
    import_must_fail_reads("vhdx", with(VHDX_MAKE_BAT, 8, 4 << 20 | 7));
    import_must_fail_reads("vhdx", with(VHDX_MAKE_BAT, 8, 4));
}

/* ---- the log ---- */

/* A dirty image without a log, to be filled. */
static struct image_bytes with_empty_log(void)
{
    struct image_bytes i = vhdx_make(false);

    vhdx_make_headers(&i, true);
    return i;
}

static void test_vhdx__a_log_that_says_nothing_sound_is_refused(void **state)
{
    struct image_bytes i = with_empty_log();
    struct vhdx_entry e;

    (void)state;
    import_must_refuse("vhdx", i, EINVAL, "its log holds nothing sound to replay");
    i = with_empty_log();
    vhdx_entry_begin(&e, 1, 3); /* its tail is none */
    vhdx_entry_put(&e, &i, 0);
    import_must_refuse("vhdx", i, EINVAL, "its log holds nothing sound to replay");
    i = with_empty_log();
    vhdx_entry_begin(&e, 1, 0);
    vhdx_entry_put(&e, &i, 0);
    i.bytes[VHDX_MAKE_LOG + 3000] ^= 1; /* its sum is wrong */
    import_must_refuse("vhdx", i, EINVAL, "its log holds nothing sound to replay");
    i = with_empty_log();
    vhdx_entry_begin(&e, 1, 0);
    e.bytes[32] ^= 1; /* of another log */
    vhdx_entry_put(&e, &i, 0);
    import_must_refuse("vhdx", i, EINVAL, "its log holds nothing sound to replay");
    i = with_empty_log();
    vhdx_entry_begin(&e, 1, 0);
    vhdx_entry_add(&e, 512, 4096, NULL); /* misaligned */
    vhdx_entry_put(&e, &i, 0);
    import_must_refuse("vhdx", i, EINVAL, "its log holds nothing sound to replay");
    i = with_empty_log();
    vhdx_entry_begin(&e, 1, 0);
    e.count = 1000; /* descriptors beyond its end */
    vhdx_entry_put(&e, &i, 0);
    import_must_refuse("vhdx", i, EINVAL, "its log holds nothing sound to replay");
}

static void test_vhdx__logs_are_bounded(void **state)
{
    struct image_bytes i;
    struct vhdx_entry e;

    (void)state;
    import_must_refuse("vhdx", with_header(true, 68, 4, 9 << 20), ENOTSUP,
                       "a log of 9437184 bytes at 1048576 is to be replayed");
    import_must_refuse("vhdx", with_header(true, 68, 4, 4096), ENOTSUP, "a log of 4096 bytes");
    import_must_refuse("vhdx", with_header(true, 72, 8, (1 << 20) + 512), ENOTSUP, "at 1049088");
    import_must_refuse("vhdx", with_header(true, 72, 8, 7 << 20), EINVAL,
                       "the log would lie at 7340032");
    i = with_empty_log();
    for (uint32_t s = 0; s < 256; s++) { /* each as long as the log */
        memcpy(i.bytes + VHDX_MAKE_LOG + (size_t)s * 4096, "loge", 4);
        store_le32(i.bytes + VHDX_MAKE_LOG + (size_t)s * 4096 + 8, 1 << 20);
        store_le64(i.bytes + VHDX_MAKE_LOG + (size_t)s * 4096 + 16, 1);
        memcpy(i.bytes + VHDX_MAKE_LOG + (size_t)s * 4096 + 32, vhdx_make_log_guid, 16);
    }
    import_must_refuse("vhdx", i, EINVAL, "the entries of the log overlap");
    i = with_empty_log();
    vhdx_entry_begin(&e, 1, 0);
    vhdx_entry_add(&e, (uint64_t)1 << 62, (uint64_t)1 << 62, NULL);
    vhdx_entry_put(&e, &i, 0);
    import_must_refuse("vhdx", i, EINVAL, "the log has changes where no file reaches");
}

#define MANY 4097u /* one more than is taken */

/* The k-th changes what lies k * step bytes on. */
static void must_refuse_many(uint64_t step)
{
    struct image_bytes i = with_empty_log();
    uint8_t *e = i.bytes + VHDX_MAKE_LOG;
    size_t len = 33 * (size_t)4096;

    memcpy(e, "loge", 4);
    store_le32(e + 8, (uint32_t)len);
    store_le64(e + 16, 1);
    store_le32(e + 24, MANY);
    memcpy(e + 32, vhdx_make_log_guid, 16);
    for (size_t k = 0; k < MANY; k++) {
        uint8_t *d = e + 64 + k * 32;

        memcpy(d, "zero", 4);
        store_le64(d + 8, 4096);
        store_le64(d + 16, k * step);
        store_le64(d + 24, 1);
    }
    vhdx_make_sum(e, len);
    import_must_refuse("vhdx", i, E2BIG, "the log has more than 4096 changes");
}

/* Those that are over each other, too: each takes time, which the other disks have to wait. */
static void test_vhdx__changes_are_bounded(void **state)
{
    (void)state;
    must_refuse_many(8192);
    must_refuse_many(0);
}

static void test_vhdx__a_file_that_was_cut_off_is_not_replayed(void **state)
{
    struct image_bytes i = vhdx_make(true);

    (void)state;
    i.len -= 4096;
    import_must_refuse("vhdx", i, EINVAL,
                       "node 'd': the file has 7335936 bytes, and its log was written when it had "
                       "7340032: it was cut off");
}

/* The file would be made longer by the replay, and what is new reads as zeroes. */
static void test_vhdx__the_file_is_as_long_as_its_log_says(void **state)
{
    struct image_bytes i = with_empty_log();
    struct vhdx_entry e;
    uint8_t bat[4096];

    (void)state;
    memcpy(bat, i.bytes + VHDX_MAKE_BAT, sizeof(bat));
    store_le64(bat + 8, 7 << 20 | 6);
    i.len += MIB;
    vhdx_entry_begin(&e, 1, 0);
    vhdx_entry_add(&e, VHDX_MAKE_BAT, 0, bat);
    vhdx_entry_put(&e, &i, 0);
    i.len -= MIB;
    store_le64(e.bytes + 48, i.len);
    vhdx_make_sum(e.bytes, 8192);
    memcpy(i.bytes + VHDX_MAKE_LOG, e.bytes, 8192);
    import_must_show("vhdx", &i);
    image_bytes_free(&i);
}

/* Changes over changes: what counts is the last one. */
static void test_vhdx__later_changes_go_over_older_ones(void **state)
{
    static const struct {
        unsigned at;
        unsigned len;
        bool zero;
    } writes[] = {
        {10, 20, true}, {12, 1, false}, {12, 1, true},  {25, 1, false}, {24, 4, true},
        {29, 1, false}, {28, 4, true},  {5, 1, false},  {4, 3, true},   {40, 1, false},
        {40, 1, false}, {0, 1, false},  {50, 10, true}, {48, 14, true}, {49, 2, true},
        {55, 1, false}, {63, 1, false}, {60, 4, true},
    };
    struct image_bytes i = with_empty_log();
    uint32_t at = 0;

    (void)state;
    for (unsigned k = 0; k < ARRAY_SIZE(writes); k++) {
        size_t offset = (size_t)writes[k].at * 4096;
        struct vhdx_entry e;
        uint8_t data[4096];

        memset(data, (int)k + 1, sizeof(data));
        vhdx_entry_begin(&e, k + 1, 0);
        vhdx_entry_add(&e, VHDX_MAKE_DATA + offset, (uint64_t)writes[k].len * 4096,
                       writes[k].zero ? NULL : data);
        vhdx_entry_put(&e, &i, at);
        at += e.data + 1;
        memset(i.disk + offset, writes[k].zero ? 0 : (int)k + 1, (size_t)writes[k].len * 4096);
    }
    import_must_show("vhdx", &i);
    image_bytes_free(&i);
}
