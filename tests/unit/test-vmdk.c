/* SPDX-License-Identifier: Apache-2.0 */
/* vmdk: what images show, and which are refused. */
#include "formats/vmdk/vmdk.h"
#include "import-fixture.h"

static void must_show(enum vmdk_make_kind kind)
{
    struct image_bytes i = vmdk_make(kind);

    import_must_show("vmdk", &i);
    image_bytes_free(&i);
}

static void test_vmdk__sparse_images_show_their_grains(void **state)
{
    (void)state;
    must_show(VMDK_MAKE_PLAIN);
}

static void test_vmdk__compressed_grains_are_decompressed(void **state)
{
    (void)state;
    must_show(VMDK_MAKE_COMPRESSED);
}

static void test_vmdk__streams_have_their_directory_at_the_end(void **state)
{
    (void)state;
    must_show(VMDK_MAKE_STREAM);
}

/* ---- headers ---- */

static struct image_bytes with(enum vmdk_make_kind kind, size_t at, unsigned width, uint64_t value)
{
    struct image_bytes i = vmdk_make(kind);

    if (width == 8)
        store_le64(i.bytes + at, value);
    else if (width == 4)
        store_le32(i.bytes + at, (uint32_t)value);
    else
        store_le16(i.bytes + at, (uint16_t)value);
    return i;
}

static void test_vmdk__refuses_what_it_does_not_know(void **state)
{
    (void)state;
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 0, 4, 0x44574f43), ENOTSUP,
                       "sparse extents of ESX (COWD) are not supported");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 0, 4, 0), EINVAL,
                       "node 'd': the descriptor does not say a type");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 4, 4, 4), ENOTSUP,
                       "the extent has version 4, and 1 to 3 are read");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 4, 4, 0), ENOTSUP, "the extent has version 0");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 73, 2, 0x0a0a), EINVAL,
                       "line ends were converted in this file");
    import_must_refuse("vmdk", with(VMDK_MAKE_COMPRESSED, 8, 4, 0x10005), ENOTSUP,
                       "compressed grains without markers");
    import_must_refuse("vmdk", with(VMDK_MAKE_COMPRESSED, 77, 2, 2), ENOTSUP,
                       "compression 2 is not supported");
}

static void test_vmdk__refuses_what_does_not_fit(void **state)
{
    struct image_bytes cut = vmdk_make(VMDK_MAKE_STREAM);

    (void)state;
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 20, 8, 7), EINVAL, "grains of 7 sectors");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 20, 8, 0), EINVAL, "grains of 0 sectors");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 20, 8, 65536), EINVAL,
                       "grains of 65536 sectors");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 44, 4, 0), EINVAL,
                       "grain tables of 0 entries");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 44, 4, 513), EINVAL,
                       "grain tables of 513 entries");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 12, 8, (uint64_t)1 << 60), EINVAL,
                       "an extent of 1152921504606846976 sectors");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 12, 8, (uint64_t)1 << 40), EINVAL,
                       "a directory of 34359738368 grain tables cannot lie at sector 3");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 56, 8, (uint64_t)1 << 56), EINVAL,
                       "cannot lie at sector 72057594037927936");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 28, 8, 0), EINVAL,
                       "this is an extent of a larger image: open its descriptor");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 28, 8, UINT64_MAX), EINVAL,
                       "a descriptor of 2 sectors cannot lie at sector 18446744073709551615");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 36, 8, 0), EINVAL, "a descriptor of 0 bytes");
    import_must_refuse("vmdk", with(VMDK_MAKE_PLAIN, 36, 8, 513), EINVAL,
                       "a descriptor of 262656 bytes");
    cut.len -= 512;
    import_must_refuse("vmdk", cut, EINVAL,
                       "there is no footer at the end of the file: it was cut off");
    cut = vmdk_make(VMDK_MAKE_STREAM);
    cut.len = 1024;
    import_must_refuse("vmdk", cut, EINVAL, "the file ends before its footer");
    cut = vmdk_make(VMDK_MAKE_STREAM);
    store_le32(cut.bytes + cut.len - 1024 + 4, 9);
    import_must_refuse("vmdk", cut, ENOTSUP, "the extent has version 9");
    cut = vmdk_make(VMDK_MAKE_STREAM);
    cut.len = 3;
    import_must_refuse("vmdk", cut, EINVAL, "the signature would lie at 0, 4 bytes long");
}

static void test_vmdk__places_beyond_the_end_are_damage(void **state)
{
    struct image_bytes i = vmdk_make(VMDK_MAKE_PLAIN);
    uint32_t end = (uint32_t)(i.len / 512);

    (void)state;
    import_must_fail_reads("vmdk", with(VMDK_MAKE_PLAIN, VMDK_MAKE_DIRECTORY, 4, end));
    import_must_fail_reads("vmdk", with(VMDK_MAKE_PLAIN, VMDK_MAKE_DIRECTORY, 4, 0xffffffff));
    import_must_fail_reads("vmdk", with(VMDK_MAKE_PLAIN, VMDK_MAKE_TABLES, 4, end));
    import_must_fail_reads("vmdk", with(VMDK_MAKE_PLAIN, VMDK_MAKE_TABLES, 4, 0xffffffff));
    image_bytes_free(&i);
}

/* The first grain that lies in the file is that of the last block. */
static void test_vmdk__damaged_grains_are_not_shown(void **state)
{
    struct image_bytes i;

    (void)state;
    import_must_fail_reads("vmdk", with(VMDK_MAKE_COMPRESSED, VMDK_MAKE_GRAINS, 4, 1));
    import_must_fail_reads("vmdk", with(VMDK_MAKE_COMPRESSED, VMDK_MAKE_GRAINS + 8, 4, 0));
    i = with(VMDK_MAKE_COMPRESSED, VMDK_MAKE_GRAINS + 8, 4, 2 * VMDK_MAKE_GRAIN + 1);
    i.len = VMDK_MAKE_GRAINS + (size_t)3 * VMDK_MAKE_GRAIN; /* there would be so much */
    import_must_fail_reads("vmdk", i);
    import_must_fail_reads("vmdk", with(VMDK_MAKE_COMPRESSED, VMDK_MAKE_GRAINS + 8, 4, 20));
    i = vmdk_make(VMDK_MAKE_COMPRESSED);
    i.bytes[VMDK_MAKE_GRAINS + 50] ^= 0x10;
    import_must_fail_reads("vmdk", i);
}

/* ---- descriptors ---- */

#define HEAD "# Disk DescriptorFile\nversion=1\nCID=12\nparentCID=ffffffff\n"

static void must_parse(const char *text, struct vmdk_descriptor *ret)
{
    struct error *err = NULL;

    if (vmdk_descriptor_parse(ret, (const uint8_t *)text, strlen(text), "d", &err) < 0)
        fail_msg("%s", error_text(err));
}

static void must_not_parse(const char *text, int errnum, const char *message)
{
    struct vmdk_descriptor d;
    struct error *err = NULL;

    assert_int_equal(vmdk_descriptor_parse(&d, (const uint8_t *)text, strlen(text), "d", &err),
                     -errnum);
    must_say(err, message);
    error_free(&err);
}

static void test_vmdk__descriptors_are_read(void **state)
{
    struct vmdk_descriptor d;

    (void)state;
    must_parse(HEAD "createType = \"twoGbMaxExtentFlat\" \r\nRW 10 FLAT \"a b.vmdk\" 7\r\n"
                    "  RDONLY 4192256 SPARSE \"c.vmdk\"\nRW 3 ZERO\n#RW 3 ZERO\nRW 5 VMFS \"e\"",
               &d);
    assert_int_equal(d.cid, 0x12);
    assert_int_equal(d.parent_cid, 0xffffffff);
    assert_string_equal(d.create_type, "twoGbMaxExtentFlat");
    assert_int_equal(d.count, 4);
    assert_int_equal(d.lines[0].kind, VMDK_FLAT);
    assert_int_equal(d.lines[0].sectors, 10);
    assert_int_equal(d.lines[0].first, 7);
    assert_string_equal(d.lines[0].name, "a b.vmdk");
    assert_int_equal(d.lines[1].kind, VMDK_SPARSE);
    assert_int_equal(d.lines[2].kind, VMDK_ZERO);
    assert_null(d.lines[2].name);
    assert_string_equal(d.lines[3].type, "VMFS");
    vmdk_descriptor_release(&d);
}

static void test_vmdk__descriptors_are_refused_by_what_is_wrong(void **state)
{
    (void)state;
    must_not_parse("", EINVAL, "node 'd': the descriptor does not say a type");
    must_not_parse(HEAD "createType=\"vmfs\"\n", EINVAL, "the descriptor names no extents");
    must_not_parse(HEAD "createType=\"custom\"\nRW 1 ZERO\n", ENOTSUP,
                   "images of type 'custom' are not supported");
    must_not_parse(HEAD "createType=\"vmfs\"\nparentCID=1\nRW 1 ZERO\n", ENOTSUP,
                   "a difference to another one");
    must_not_parse("CID=xyz\n", EINVAL, "the content ID 'xyz' is no number of 32 bits");
    must_not_parse("CID=123456789\n", EINVAL, "the content ID '123456789'");
    must_not_parse("NOACCESS 1 ZERO\n", ENOTSUP, "an extent is not to be accessed");
    must_not_parse("RW x ZERO\n", EINVAL, "an extent of 'x' sectors");
    must_not_parse("RW -1 ZERO\n", EINVAL, "an extent of '-1' sectors");
    must_not_parse("RW 99999999999999999999 ZERO\n", EINVAL, "an extent of '99999999999999999999'");
    must_not_parse("RW 18014398509481984 ZERO\n", EINVAL, "an extent of '18014398509481984'");
    must_not_parse("RW 1 VMFSRDM \"x\"\n", ENOTSUP, "extents of type 'VMFSRDM' are not supported");
    must_not_parse("RW 1 SESPARSE \"x\"\n", ENOTSUP, "extents of type 'SESPARSE'");
    must_not_parse("RW 1\n", ENOTSUP, "extents of type '' are not supported");
    must_not_parse("RW 1 FLAT\n", EINVAL, "an extent has no file name");
    must_not_parse("RW 1 FLAT \"x\n", EINVAL, "an extent has no file name");
    must_not_parse("RW 1 FLAT \"\" 0\n", EINVAL, "an extent has no file name");
    must_not_parse("RW 1 FLAT \"x\" y\n", EINVAL, "extent 'x' begins at sector 'y'");
    must_not_parse("RW 1 FLAT \"x\" 18014398509481984\n", EINVAL, "extent 'x' begins at sector");
    must_not_parse("RW 1 \033[31m \"x\" 0\n", ENOTSUP, "extents of type '?[31m' are not");
}

static void test_vmdk__descriptors_have_so_many_extents(void **state)
{
    static const char line[] = "RW 1 ZERO\n";
    size_t len = (VMDK_EXTENTS_MAX + 1) * (sizeof(line) - 1);
    char *text = xalloc(len + 1, 1);

    (void)state;
    for (size_t at = 0; at < len; at += sizeof(line) - 1)
        memcpy(text + at, line, sizeof(line) - 1);
    must_not_parse(text, E2BIG, "there are more than 1024 extents");
    free(text);
}

/* ---- several files ---- */

#define GRAINS_BYTES (IMPORT_BLOCKS * VMDK_MAKE_GRAIN)

struct split {
    const char *text;    /* of the descriptor */
    const char *message; /* NULL: it opens */
    int errnum;
    struct image_bytes disk;
};

/* /disk/image names s (sparse), f (flat, 8 KiB). */
static void open_split(void *arg)
{
    struct split *x = arg;
    struct graph *g = graph_new(import_drivers);
    static const char node[] = "{'driver':'vmdk','node-name':'d','read-only':true,"
                               "'file':{'driver':'file','filename':'/disk/image'}}";

    if (x->message) {
        must_refuse(x->errnum, x->message, g, "%s", node);
    } else {
        struct backend *b;

        must_add(g, "%s", node);
        b = must_attach(g, "d", (struct access){ACCESS_READ, ACCESS_ALL}, "test");
        import_compare(b, &x->disk, x->disk.disk_len);
        import_compare(b, &x->disk, 1000);
        import_compare_extents(b, &x->disk);
        backend_co_free(b);
    }
    graph_co_free(g);
}

static void try_split(struct split *x)
{
    struct sim_disk *disk = sim_disk_new();
    struct image_bytes s = vmdk_make(VMDK_MAKE_PLAIN);
    uint8_t flat[8192];

    for (size_t i = 0; i < sizeof(flat); i++)
        flat[i] = import_byte(7777 + i);
    import_put(disk, "/disk/image", x->text, strlen(x->text));
    import_put(disk, "/disk/s", s.bytes, s.len);
    import_put(disk, "/disk/f", flat, sizeof(flat));
    import_put(disk, "/disk/below/f", flat, sizeof(flat));
    x->disk = image_bytes_new(1, 2 * (size_t)GRAINS_BYTES + 16384);
    memcpy(x->disk.disk, flat + 512, 4096);
    memcpy(x->disk.disk + 4096 + 2048, s.disk, GRAINS_BYTES);
    memcpy(x->disk.disk + 4096 + 2048 + GRAINS_BYTES, flat, 8192);
    memcpy(x->disk.disk + 4096 + 2048 + GRAINS_BYTES + 8192, s.disk, GRAINS_BYTES - 1024);
    x->disk.disk_len = 4096 + 2048 + 2 * (size_t)GRAINS_BYTES + 8192 - 1024;
    import_run(disk, open_split, x);
    image_bytes_free(&x->disk);
    image_bytes_free(&s);
    sim_disk_free(disk);
}

#define SPLIT HEAD "createType=\"twoGbMaxExtentFlat\"\n"

static void test_vmdk__extents_follow_each_other(void **state)
{
    struct split x = {.text = SPLIT "RW 8 FLAT \"f\" 1\nRW 4 ZERO\nRW 128 SPARSE \"s\"\n"
                                    "RW 16 FLAT \"f\" 0\nRW 126 SPARSE \"s\"\n"};

    (void)state;
    try_split(&x);
}

/* A header and a directory, and no grain table: as long as that, and no longer. */
static void test_vmdk__an_extent_without_tables_is_empty(void **state)
{
    struct split x = {.text = SPLIT "RW 128 SPARSE \"e\"\n"};
    struct image_bytes s = vmdk_make(VMDK_MAKE_PLAIN);
    struct sim_disk *disk = sim_disk_new();
    uint8_t e[1024] = {0};

    (void)state;
    memcpy(e, s.bytes, 512);
    store_le64(e + 56, 1);
    store_le32(e + 44, 512); /* a table would be longer than the file */
    import_put(disk, "/disk/image", x.text, strlen(x.text));
    import_put(disk, "/disk/e", e, sizeof(e));
    x.disk = image_bytes_new(1, (size_t)128 * 512);
    x.disk.disk_len = (size_t)128 * 512;
    import_run(disk, open_split, &x);
    image_bytes_free(&x.disk);
    image_bytes_free(&s);
    sim_disk_free(disk);
}

static void must_refuse_split(const char *text, int errnum, const char *message)
{
    struct split x = {.text = text, .message = message, .errnum = errnum};

    try_split(&x);
}

static void test_vmdk__extents_are_files_beside_their_descriptor(void **state)
{
    (void)state;
    must_refuse_split(SPLIT "RW 8 FLAT \"below/f\" 0\n", EACCES,
                      "extent 'below/f' is not named as a file in the image's own directory");
    must_refuse_split(SPLIT "RW 8 FLAT \"/disk/f\" 0\n", EACCES, "extent '/disk/f' is not named");
    must_refuse_split(SPLIT "RW 8 FLAT \"below\\f\" 0\n", EACCES, "is not named as a file");
    must_refuse_split(SPLIT "RW 8 FLAT \"file:f\" 0\n", EACCES, "extent 'file:f' is not named");
    must_refuse_split(SPLIT "RW 8 FLAT \"..\" 0\n", EACCES, "extent '..' is not named");
    must_refuse_split(SPLIT "RW 8 FLAT \"nowhere\" 0\n", ENOENT, "node 'd': extents.0 'nowhere'");
    must_refuse_split(SPLIT "RW 8 FLAT \"image\" 0\n", EINVAL, "it is the image itself");
}

static void test_vmdk__extents_have_what_the_descriptor_says(void **state)
{
    (void)state;
    must_refuse_split(SPLIT "RW 16 FLAT \"f\" 1\n", EINVAL,
                      "extent 'f': node 'd': 8192 bytes cannot lie at 512 of a file of 8192");
    must_refuse_split(SPLIT "RW 1 FLAT \"f\" 18014398509481\n", EINVAL, "512 bytes cannot lie at");
    must_refuse_split(SPLIT "RW 129 SPARSE \"s\"\n", EINVAL,
                      "extent 's': node 'd': it has 128 sectors, and the descriptor says 129");
    must_refuse_split(SPLIT "RW 8 SPARSE \"f\"\n", EINVAL, "extent 'f': node 'd': this is no VMDK");
    must_refuse_split(SPLIT "RW 18014398507384000 ZERO\nRW 18014398507384000 ZERO\n", EINVAL,
                      "the disk would have more than");
}

static void look_for_holes(void *arg)
{
    struct graph *g = graph_new(import_drivers);
    struct extent v[8];
    struct extents e = {.v = v, .max = ARRAY_SIZE(v)};
    struct request req = {.kind = REQUEST_EXTENTS, .len = MIB, .extents = &e};
    struct backend *b;

    (void)arg;
    must_add(g, "{'driver':'vmdk','node-name':'d','read-only':true,"
                "'file':{'driver':'file','filename':'/disk/image'}}");
    b = must_attach(g, "d", (struct access){ACCESS_READ, ACCESS_ALL}, "test");
    assert_int_equal(backend_co_request(b, &req), 0);
    assert_int_equal(e.count, 3);
    assert_false(v[0].flags & EXTENT_DATA && !(v[0].flags & EXTENT_ZERO));
    assert_int_equal(v[1].offset, 65536);
    assert_int_equal(v[1].len, 4096);
    assert_int_equal(v[1].flags, EXTENT_DATA | EXTENT_ALLOCATED | EXTENT_OFFSET_VALID);
    assert_true(v[2].flags & EXTENT_ZERO);
    backend_co_free(b);
    graph_co_free(g);
}

/* A copy of such a disk takes what its data take, not its size (P5). */
static void test_vmdk__holes_of_flat_extents_are_told(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = MIB};
    static const char text[] = SPLIT "RW 2048 FLAT \"f\" 0\n";
    struct sim_disk *disk = sim_disk_new();
    uint8_t data[4096];

    (void)state;
    memset(data, 1, sizeof(data));
    import_put(disk, "/disk/image", text, sizeof(text) - 1);
    sim_disk_make(disk, "/disk/f", &setup);
    sim_disk_write(disk, "/disk/f", 65536, data, sizeof(data));
    import_run(disk, look_for_holes, NULL);
    sim_disk_free(disk);
}
