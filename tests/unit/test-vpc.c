/* SPDX-License-Identifier: Apache-2.0 */
/* vpc: what images show, and which are refused. */
#include "import-fixture.h"

static void test_vpc__dynamic_images_show_the_sectors_that_were_written(void **state)
{
    struct image_bytes i = vpc_make(false);

    (void)state;
    import_must_show("vpc", &i);
    image_bytes_free(&i);
}

static void test_vpc__fixed_images_end_before_their_footer(void **state)
{
    struct image_bytes i = vpc_make(true);

    (void)state;
    import_must_show("vpc", &i);
    image_bytes_free(&i);
}

/* Changes the copy at the start and the footer. */
static struct image_bytes with_footer(bool fixed, size_t at, unsigned width, uint64_t value)
{
    struct image_bytes i = vpc_make(fixed);
    uint8_t *f = i.bytes + i.len - 512;

    if (width == 8)
        store_be64(f + at, value);
    else
        store_be32(f + at, (uint32_t)value);
    vpc_sum(f, 512, 64);
    if (!fixed)
        memcpy(i.bytes, f, 512);
    return i;
}

static struct image_bytes with_header(size_t at, unsigned width, uint64_t value)
{
    struct image_bytes i = vpc_make(false);
    uint8_t *h = i.bytes + VPC_MAKE_HEADER;

    if (width == 8)
        store_be64(h + at, value);
    else
        store_be32(h + at, (uint32_t)value);
    vpc_sum(h, 1024, 36);
    return i;
}

static struct image_bytes with_byte_off(size_t at)
{
    struct image_bytes i = vpc_make(false);

    i.bytes[at] ^= 1;
    return i;
}

static void test_vpc__one_sound_footer_is_enough(void **state)
{
    struct image_bytes i = with_byte_off(100);

    (void)state;
    import_must_show("vpc", &i);
    image_bytes_free(&i);
    i = with_byte_off(100);
    i.bytes[i.len - 100] ^= 1;
    import_must_refuse("vpc", i, EINVAL, "node 'd': the checksum of the footer is wrong");
}

static void test_vpc__the_disk_is_as_large_as_its_maker_showed_it(void **state)
{
    static const char *const by_geometry[] = {"qemu", "vpc ", "vs  "};
    struct image_bytes i;

    (void)state;
    for (size_t k = 0; k < ARRAY_SIZE(by_geometry); k++) {
        i = with_footer(true, 28, 4, load_be32(by_geometry[k]));
        i.disk_len = 3 * 512;
        import_must_show("vpc", &i);
        image_bytes_free(&i);
    }
    i = with_footer(true, 28, 4, load_be32("qemu"));
    store_be32(i.bytes + i.len - 512 + 56, 0xffff10ff); /* the largest geometry says nothing */
    vpc_sum(i.bytes + i.len - 512, 512, 64);
    import_must_show("vpc", &i);
    image_bytes_free(&i);
}

static void test_vpc__refuses_what_it_does_not_know(void **state)
{
    struct image_bytes none = vpc_make(true);

    (void)state;
    memset(none.bytes + none.len - 512, 0, 512);
    import_must_refuse("vpc", none, EINVAL,
                       "node 'd': this is no VHD image: neither begin nor end is a footer");
    import_must_refuse("vpc", with_footer(false, 12, 4, 0x20000), ENOTSUP,
                       "the image has version 2, and only 1 is read");
    import_must_refuse("vpc", with_footer(false, 60, 4, 4), ENOTSUP, "a difference to another one");
    import_must_refuse("vpc", with_footer(false, 60, 4, 5), ENOTSUP, "the image is of type 5");
    import_must_refuse("vpc", with_byte_off(VPC_MAKE_HEADER), EINVAL, "there is no dynamic header");
    import_must_refuse("vpc", with_byte_off(VPC_MAKE_HEADER + 100), EINVAL,
                       "the checksum of the dynamic header is wrong");
    import_must_refuse("vpc", with_header(24, 4, 0x20000), ENOTSUP,
                       "the dynamic header has version 2");
    import_must_refuse("vpc", with_header(32, 4, 4095), EINVAL, "blocks of 4095 bytes");
    import_must_refuse("vpc", with_header(32, 4, 256), EINVAL, "blocks of 256 bytes");
    import_must_refuse("vpc", with_header(32, 4, 0x80000000), EINVAL, "blocks of 2147483648 bytes");
}

static void test_vpc__refuses_what_does_not_fit(void **state)
{
    struct image_bytes cut = vpc_make(true);

    (void)state;
    import_must_refuse("vpc", with_footer(true, 48, 8, 17 * VPC_MAKE_BLOCK), EINVAL,
                       "a fixed disk of 69632 bytes in a file of 66048");
    import_must_refuse("vpc", with_footer(false, 48, 8, 17 * VPC_MAKE_BLOCK), EINVAL,
                       "a disk of 69632 bytes, and 16 blocks of 4096 bytes");
    import_must_refuse("vpc", with_footer(false, 48, 8, UINT64_MAX - 511), EINVAL, "a disk of ");
    import_must_refuse("vpc", with_footer(false, 48, 8, 1000), EINVAL, "a disk of 1000 bytes");
    import_must_refuse("vpc", with_footer(false, 16, 8, UINT64_MAX), EINVAL,
                       "the dynamic header would lie at 18446744073709551615");
    import_must_refuse("vpc", with_header(16, 8, 513), EINVAL, "cannot lie at 513");
    import_must_refuse("vpc", with_header(16, 8, UINT64_MAX - 511), EINVAL, "cannot lie at ");
    import_must_refuse("vpc", with_header(28, 4, 0xffffffff), EINVAL,
                       "a table of 4294967295 blocks");
    cut.len = 511;
    import_must_refuse("vpc", cut, EINVAL, "this is no VHD image: it has 511 bytes");
}

static struct image_bytes with_entry(uint32_t sector)
{
    struct image_bytes i = vpc_make(false);

    store_be32(i.bytes + VPC_MAKE_TABLE, sector);
    return i;
}

static void test_vpc__blocks_beyond_the_end_are_damage(void **state)
{
    struct image_bytes i = vpc_make(false);
    uint32_t last = (uint32_t)((i.len - 512 - VPC_MAKE_BLOCK) / 512);

    (void)state;
    import_must_fail_reads("vpc", with_entry(last + 1));
    import_must_fail_reads("vpc", with_entry(0xfffffffe));
    image_bytes_free(&i);
}
