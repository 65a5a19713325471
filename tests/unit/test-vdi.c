/* SPDX-License-Identifier: Apache-2.0 */
/* vdi: what images show, and which are refused. */
#include "base/prng.h"

#include "formats/import.h"
#include "import-fixture.h"
#include <malloc.h>

static void test_vdi__dynamic_images_show_their_blocks(void **state)
{
    struct image_bytes i = vdi_make(false);

    (void)state;
    import_must_show("vdi", &i);
    image_bytes_free(&i);
}

static void test_vdi__static_images_show_their_blocks(void **state)
{
    struct image_bytes i = vdi_make(true);

    (void)state;
    import_must_show("vdi", &i);
    image_bytes_free(&i);
}

static struct image_bytes with_le32(size_t at, uint32_t value)
{
    struct image_bytes i = vdi_make(false);

    store_le32(i.bytes + at, value);
    return i;
}

static void test_vdi__refuses_what_it_does_not_know(void **state)
{
    (void)state;
    import_must_refuse("vdi", with_le32(64, 0xbeda107e), EINVAL,
                       "node 'd': this is no VDI image: the signature is 0xbeda107e");
    import_must_refuse("vdi", with_le32(68, 0x00020001), ENOTSUP,
                       "version 2.1, and only version 1.1");
    import_must_refuse("vdi", with_le32(76, 3), ENOTSUP, "the image is of type 3");
    import_must_refuse("vdi", with_le32(424, 1), ENOTSUP, "a difference to another one");
    import_must_refuse("vdi", with_le32(440, 1), ENOTSUP, "a difference to another one");
    import_must_refuse("vdi", with_le32(360, 4096), ENOTSUP, "sectors of 4096 bytes");
    import_must_refuse("vdi", with_le32(376, 4095), ENOTSUP, "blocks of 4095 bytes");
    import_must_refuse("vdi", with_le32(376, 0), ENOTSUP, "blocks of 0 bytes");
    import_must_refuse("vdi", with_le32(376, 256), ENOTSUP, "blocks of 256 bytes");
    import_must_refuse("vdi", with_le32(380, 512), ENOTSUP, "with 512 more");
}

static void test_vdi__refuses_tables_that_do_not_fit(void **state)
{
    struct image_bytes cut = vdi_make(false);

    (void)state;
    import_must_refuse("vdi", with_le32(384, IMPORT_BLOCKS - 1), EINVAL,
                       "a disk of 65024 bytes, and 15 blocks of 4096 bytes");
    import_must_refuse("vdi", with_le32(372, 0x80000000), EINVAL, "a disk of 9223372036854840832");
    import_must_refuse("vdi", with_le32(384, 0xffffffff), EINVAL,
                       "a table of 4294967295 blocks cannot lie at 512");
    import_must_refuse("vdi", with_le32(340, 513), EINVAL, "cannot lie at 513");
    import_must_refuse("vdi", with_le32(340, 0), EINVAL, "cannot lie at 0");
    import_must_refuse("vdi", with_le32(340, 66560), EINVAL,
                       "cannot lie at 66560 of a file of 66560");
    cut.len = 511;
    import_must_refuse(
        "vdi", cut, EINVAL,
        "node 'd': the header would lie at 0, 512 bytes long, and the file ends at 511");
}

static void test_vdi__blocks_beyond_the_end_are_damage(void **state)
{
    struct image_bytes cut = vdi_make(false);

    (void)state;
    import_must_fail_reads("vdi", with_le32(VDI_MAKE_MAP, IMPORT_BLOCKS));
    import_must_fail_reads("vdi", with_le32(VDI_MAKE_MAP, 0xfffffffd));
    cut.len -= 1;
    import_must_fail_reads("vdi", cut);
}

static void never_written(void *arg)
{
    struct graph *g = graph_new(import_drivers);

    (void)arg;
    must_refuse(
        EROFS, "images of format 'vdi' are never written: set read-only", g,
        "{'driver':'vdi','node-name':'d','file':{'driver':'file','filename':'/disk/image'}}");
    must_add(g, "{'driver':'vdi','node-name':'d','auto-read-only':true,"
                "'file':{'driver':'file','filename':'/disk/image'}}");
    assert_true(node_settings(graph_find(g, "d"))->read_only);
    graph_co_free(g);
}

static void test_vdi__is_never_written(void **state)
{
    struct sim_disk *disk = sim_disk_new();
    struct image_bytes i = vdi_make(false);

    (void)state;
    import_put(disk, "/disk/image", i.bytes, i.len);
    import_run(disk, never_written, NULL);
    sim_disk_free(disk);
    image_bytes_free(&i);
}

/* A table of many pages, more than are kept, in random order. */
#define MANY_BLOCKS       (IMPORT_TEST_PAGES * 4096u)
#define IMPORT_TEST_PAGES 300u

static struct image_bytes many_make(struct prng *prng)
{
    uint32_t stored = 64;
    size_t data = 512 + MANY_BLOCKS * 4;
    struct image_bytes i = image_bytes_new(data + (size_t)stored * 512, (size_t)MANY_BLOCKS * 512);
    uint8_t *h = i.bytes;

    store_le32(h + 64, 0xbeda107f);
    store_le32(h + 68, 0x00010001);
    store_le32(h + 76, 1);
    store_le32(h + 340, 512);
    store_le32(h + 344, (uint32_t)data);
    store_le32(h + 360, 512);
    store_le64(h + 368, i.disk_len);
    store_le32(h + 376, 512);
    store_le32(h + 384, MANY_BLOCKS);
    memset(h + 512, 0xff, MANY_BLOCKS * 4);
    for (uint32_t index = 0; index < stored; index++) {
        uint32_t block = (uint32_t)prng_below(prng, MANY_BLOCKS);

        if (load_le32(h + 512 + (size_t)block * 4) != 0xffffffff)
            continue;
        store_le32(h + 512 + (size_t)block * 4, index);
        import_fill(&i, data + (size_t)index * 512, (uint64_t)block * 512, 512);
    }
    return i;
}

struct many {
    struct image_bytes image;
    struct prng *prng;
};

static void read_anywhere(void *arg)
{
    struct many *m = arg;
    struct graph *g = graph_new(import_drivers);
    struct backend *b;
    uint8_t data[4096];
    size_t before;

    must_add(g, "{'driver':'vdi','node-name':'d','read-only':true,"
                "'file':{'driver':'file','filename':'/disk/image'}}");
    b = must_attach(g, "d", (struct access){ACCESS_READ, ACCESS_ALL}, "test");
    before = mallinfo2().uordblks; /* nothing in builds with a sanitizer */
    import_compare(b, &m->image, MIB);
    for (int i = 0; i < 300; i++) {
        uint64_t at = prng_below(m->prng, m->image.disk_len - sizeof(data));

        assert_int_equal(read_at(b, at, sizeof(data), data), 0);
        assert_memory_equal(data, m->image.disk + at, sizeof(data));
    }
    assert_true(mallinfo2().uordblks <= before + (IMPORT_PAGES + 8) * (IMPORT_PAGE_BYTES + 256));
    backend_co_free(b);
    graph_co_free(g);
}

static void test_vdi__tables_larger_than_the_cache_are_read_in_pages(void **state)
{
    struct prng prng = {.state = 5};
    struct many m = {.image = many_make(&prng), .prng = &prng};
    struct sim_disk *disk = sim_disk_new();

    (void)state;
    import_put(disk, "/disk/image", m.image.bytes, m.image.len);
    import_run(disk, read_anywhere, &m);
    sim_disk_free(disk);
    image_bytes_free(&m.image);
}
