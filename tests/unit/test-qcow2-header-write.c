/* SPDX-License-Identifier: Apache-2.0 */
/* Another backing file, or version, in a header: what becomes of the rest, and what a power cut between the writes leaves. */
#include "base/alloc.h"
#include "base/endian.h"
#include "base/macros.h"
#include "base/prng.h"
#include "formats/qcow2/qcow2-create.h"
#include "formats/qcow2/qcow2-header-write.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SPACE ((size_t)QCOW2_HEADER_BYTES_MAX)

struct sample {
    uint8_t *bytes;
    size_t len; /* of the first cluster, or as much as counts of it */
    uint64_t file_size;
};

static char *name_of(size_t len)
{
    char *name = xnew_n(char, len + 1);

    memset(name, 'n', len);
    return name;
}

static struct sample sample_make(unsigned cluster_bits, unsigned version, const char *file,
                                 const char *format)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;
    struct sample s = {.bytes = xnew_n(uint8_t, SPACE),
                       .len = MIN(SPACE, (size_t)1 << cluster_bits)};
    struct qcow2_layout layout;
    struct error *err = NULL;

    o.size = MIB;
    o.cluster_bits = cluster_bits;
    o.version = version;
    o.backing_file = file;
    o.backing_format = format;
    assert_int_equal(qcow2_layout_make(&o, &layout, &err), 0);
    qcow2_layout_read(&layout, 0, s.bytes, SPACE);
    s.file_size = layout.file_size;
    return s;
}

/* Puts an extension that nobody knows before the others, as another program may. */
static void sample_add_unknown(struct sample *s, size_t len)
{
    size_t at = load_be32(s->bytes + QCOW2_OFFSET_HEADER_LENGTH);
    size_t whole = QCOW2_EXTENSION_HEAD + len;
    uint64_t name = load_be64(s->bytes + QCOW2_OFFSET_BACKING_FILE_OFFSET);

    memmove(s->bytes + at + whole, s->bytes + at, s->len - at - whole);
    store_be32(s->bytes + at, 0x12345678);
    store_be32(s->bytes + at + 4, (uint32_t)len);
    memset(s->bytes + at + QCOW2_EXTENSION_HEAD, 0xab, len);
    if (name)
        store_be64(s->bytes + QCOW2_OFFSET_BACKING_FILE_OFFSET, name + whole);
}

static int parse(const struct sample *s, const uint8_t *bytes, struct qcow2_header *ret)
{
    struct error *err = NULL;
    int r =
        qcow2_header_parse(ret, bytes, MIN(SPACE, (size_t)s->file_size), s->file_size, "n", &err);

    error_free(&err);
    return r;
}

static void assert_same_text(const char *a, const char *b)
{
    if (!a || !b)
        assert_ptr_equal(a, b);
    else
        assert_string_equal(a, b);
}

static void assert_names(const struct sample *s, const uint8_t *bytes, const char *file,
                         const char *format)
{
    struct qcow2_header h;

    assert_int_equal(parse(s, bytes, &h), 0);
    assert_same_text(h.backing_file, file);
    assert_same_text(h.backing_format, format);
    qcow2_header_release(&h);
}

/* 0, or what is returned instead. On success all promises are looked at. */
static int change(struct sample *s, const char *file, const char *format, struct prng *prng)
{
    uint8_t *next = xnew_n(uint8_t, SPACE);
    uint8_t *torn = xnew_n(uint8_t, SPACE);
    struct error *err = NULL;
    struct qcow2_header old;
    struct qcow2_header new;
    int r;

    assert_int_equal(parse(s, s->bytes, &old), 0);
    memcpy(next, s->bytes, SPACE);
    r = qcow2_header_with_backing(&old, s->bytes, s->len, file, format, next, &err);
    error_free(&err);
    if (r == 0) {
        assert_names(s, next, file, file ? format : NULL);
        assert_int_equal(parse(s, next, &new), 0);
        for (unsigned i = 0; i < old.extension_count; i++) {
            const struct qcow2_extension *e = &old.extensions[i];
            bool found = e->type == QCOW2_EXTENSION_BACKING_FORMAT ||
                         e->type == QCOW2_EXTENSION_FEATURE_NAMES;

            for (unsigned k = 0; k < new.extension_count && !found; k++)
                found = new.extensions[k].type == e->type &&new.extensions[k].len ==
                        e->len &&memcmp(new.extensions[k].data, e->data, e->len) == 0;
            assert_true(found);
        }
        qcow2_header_release(&new);
        /* A power cut while the rest is written: any of its bytes may be old or new. */
        for (unsigned n = 0; n < 8; n++) {
            memcpy(torn, s->bytes, SPACE);
            for (size_t i = QCOW2_HEADER_SECTOR; i < s->len; i++)
                torn[i] = n == 0 || prng_next(prng) & 1 ? next[i] : torn[i];
            assert_names(s, torn, old.backing_file, old.backing_format);
        }
        memcpy(s->bytes, next, SPACE);
    }
    qcow2_header_release(&old);
    free(next);
    free(torn);
    return r;
}

/* To the other version; the backing file stays. As above. */
static int change_version(struct sample *s, struct prng *prng)
{
    uint8_t *next = xnew_n(uint8_t, SPACE);
    uint8_t *torn = xnew_n(uint8_t, SPACE);
    struct error *err = NULL;
    struct qcow2_header old;
    struct qcow2_header new;
    struct qcow2_header_new what = {.version = 3, .compatible = QCOW2_COMPATIBLE_LAZY_REFCOUNTS};
    int r;

    assert_int_equal(parse(s, s->bytes, &old), 0);
    if (old.version == 3)
        what = (struct qcow2_header_new){.version = 2};
    memcpy(next, s->bytes, SPACE);
    r = qcow2_header_rewrite(&old, s->bytes, s->len, &what, next, &err);
    error_free(&err);
    if (r == 0) {
        assert_names(s, next, old.backing_file, old.backing_format);
        assert_int_equal(parse(s, next, &new), 0);
        assert_int_equal(new.version, what.version);
        assert_int_equal(new.compatible, what.compatible);
        assert_int_equal(new.incompatible | new.autoclear, 0);
        assert_int_equal(new.refcount_order, QCOW2_REFCOUNT_ORDER_V2);
        assert_int_equal(new.size, old.size);
        assert_int_equal(new.l1_offset, old.l1_offset);
        for (unsigned i = 0; i < new.extension_count; i++)
            assert_true(what.version == 3 ||
                        new.extensions[i].type != QCOW2_EXTENSION_FEATURE_NAMES);
        for (unsigned n = 0; n < 8; n++) {
            memcpy(torn, s->bytes, SPACE);
            for (size_t i = QCOW2_HEADER_SECTOR; i < s->len; i++)
                torn[i] = n == 0 || prng_next(prng) & 1 ? next[i] : torn[i];
            qcow2_header_release(&new);
            assert_int_equal(parse(s, torn, &new), 0);
            assert_int_equal(new.version, old.version);
            assert_names(s, torn, old.backing_file, old.backing_format);
        }
        memcpy(s->bytes, next, SPACE);
        qcow2_header_release(&new);
    }
    qcow2_header_release(&old);
    free(next);
    free(torn);
    return r;
}

static void sample_release(struct sample *s)
{
    free(s->bytes);
}

static void test_qcow2_header_write__names_another_file(void **state)
{
    struct sample s = sample_make(16, 3, "a.qcow2", "qcow2");
    struct prng prng = {.state = 1};

    (void)state;
    assert_int_equal(change(&s, "other.raw", "raw", &prng), 0);
    assert_int_equal(change(&s, NULL, NULL, &prng), 0);
    assert_int_equal(change(&s, "a.qcow2", "qcow2", &prng), 0);
    assert_int_equal(change(&s, "unsaid", NULL, &prng), 0);
    sample_release(&s);
}

static void test_qcow2_header_write__refuses_what_has_no_room(void **state)
{
    struct sample s = sample_make(9, 3, "a.qcow2", "qcow2");
    AUTO(free_ptr) char *long_name = name_of(500);
    AUTO(free_ptr) char *too_long = name_of(QCOW2_BACKING_FILE_MAX + 1);
    struct prng prng = {.state = 1};

    (void)state;
    assert_int_equal(change(&s, long_name, "raw", &prng), -ENOSPC);
    assert_int_equal(change(&s, too_long, "raw", &prng), -EINVAL);
    assert_int_equal(change(&s, "", "raw", &prng), -EINVAL);
    assert_names(&s, s.bytes, "a.qcow2", "qcow2");
    sample_release(&s);
}

static void test_qcow2_header_write__every_prefix_is_a_header(void **state)
{
    static const char *const formats[] = {"raw", "qcow2", "a-format-with-a-long-name", NULL};

    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};
        AUTO(free_ptr) char *first = name_of(1 + prng_next(&prng) % 200);
        bool backed = prng_next(&prng) & 1;
        unsigned version = 2 + (prng_next(&prng) & 1);
        struct sample s = sample_make(10 + (unsigned)(prng_next(&prng) % 12), version,
                                      backed ? first : NULL, backed ? "qcow2" : NULL);
        unsigned done = 0;

        if (version == 3 && prng_next(&prng) & 1)
            sample_add_unknown(&s, 8 * (prng_next(&prng) % 20));
        for (unsigned i = 0; i < 12; i++) {
            AUTO(free_ptr) char *name = name_of(1 + prng_next(&prng) % 300);
            bool none = prng_next(&prng) % 5 == 0;
            int r = prng_next(&prng) % 4 == 0
                        ? change_version(&s, &prng)
                        : change(&s, none ? NULL : name, formats[prng_next(&prng) % 4], &prng);

            assert_true(r == 0 || r == -ENOSPC);
            done += r == 0;
        }
        assert_true(done > 0);
        sample_release(&s);
    }
}

static void test_qcow2_header_write__version_2_forgets_what_it_has_not(void **state)
{
    struct sample s = sample_make(16, 3, "a.qcow2", "qcow2");
    struct prng prng = {.state = 1};

    (void)state;
    sample_add_unknown(&s, 64);
    for (unsigned i = 0; i < 4; i++)
        assert_int_equal(change_version(&s, &prng), 0);
    assert_names(&s, s.bytes, "a.qcow2", "qcow2");
    assert_int_equal(load_be32(s.bytes + QCOW2_OFFSET_VERSION), 3);
    sample_release(&s);
}
