/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The backing file's name goes where nothing of the old header lies, so that the old one stays readable until the first sector, with
 * all that points to the name, is written. Extensions may move only within the first sector, or from there on into what the old
 * header does not use.
 */
#include "formats/qcow2/qcow2-header-write.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"

#include <errno.h>
#include <string.h>

/* What the header becomes. */
struct target {
    struct qcow2_header_new base;
    const char *file; /* NULL: no backing file */
    const char *format;
};

static uint32_t target_header_length(const struct qcow2_header *h, const struct target *t)
{
    if (t->base.version == h->version)
        return h->header_length;
    return t->base.version == 2 ? QCOW2_HEADER_LENGTH_V2 : QCOW2_HEADER_LENGTH_V3;
}

/* The fields that a version has more than the other. */
static void qcow2_header_put_version(const struct qcow2_header *h, const struct target *t,
                                     uint8_t *bytes)
{
    if (t->base.version != h->version) {
        store_be32(bytes + QCOW2_OFFSET_VERSION, t->base.version);
        if (t->base.version == 2)
            return;
        memset(bytes + QCOW2_OFFSET_INCOMPATIBLE, 0,
               QCOW2_HEADER_LENGTH_V3 - QCOW2_OFFSET_INCOMPATIBLE);
        store_be32(bytes + QCOW2_OFFSET_REFCOUNT_ORDER, QCOW2_REFCOUNT_ORDER_V2);
        store_be32(bytes + QCOW2_OFFSET_HEADER_LENGTH, QCOW2_HEADER_LENGTH_V3);
    }
    if (t->base.version < 3)
        return;
    store_be64(bytes + QCOW2_OFFSET_COMPATIBLE, t->base.compatible);
    if (t->base.data_not_raw)
        store_be64(bytes + QCOW2_OFFSET_AUTOCLEAR, h->autoclear & ~QCOW2_AUTOCLEAR_RAW_DATA);
}

static bool is_left_out(const struct target *t, uint32_t type, bool features)
{
    if (type == QCOW2_EXTENSION_FEATURE_NAMES)
        return !features || t->base.version == 2;
    return type == QCOW2_EXTENSION_BITMAPS && t->base.version == 2;
}

/* What the old header uses of the bytes from `from` to `to`. */
struct used {
    size_t extensions_end; /* with the end marker */
    size_t name;
    size_t name_end;
};

static struct used qcow2_header_used(const struct qcow2_header *h, const uint8_t *old)
{
    struct used u = {.extensions_end = h->header_length};

    for (unsigned i = 0; i < h->extension_count; i++)
        u.extensions_end +=
            QCOW2_EXTENSION_HEAD + (size_t)align_up(h->extensions[i].len, QCOW2_EXTENSION_ALIGN);
    u.extensions_end += QCOW2_EXTENSION_HEAD;
    if (h->backing_file) {
        u.name = (size_t)load_be64(old + QCOW2_OFFSET_BACKING_FILE_OFFSET);
        u.name_end = u.name + load_be32(old + QCOW2_OFFSET_BACKING_FILE_SIZE);
    }
    return u;
}

/* Appends an extension at *at; false if there is no room. */
static bool qcow2_header_append(uint8_t *bytes, size_t len, size_t *at, uint32_t type,
                                const void *data, size_t data_len)
{
    size_t whole = QCOW2_EXTENSION_HEAD + (size_t)align_up(data_len, QCOW2_EXTENSION_ALIGN);

    if (!range_within(*at, whole, len))
        return false;
    memset(bytes + *at, 0, whole);
    store_be32(bytes + *at, type);
    store_be32(bytes + *at + 4, (uint32_t)data_len);
    if (data_len)
        memcpy(bytes + *at + QCOW2_EXTENSION_HEAD, data, data_len);
    *at += whole;
    return true;
}

/* All extensions with another format: the format's stands where it was, or first. Returns their end, 0 if there is no room. */
static size_t qcow2_header_put_extensions(const struct qcow2_header *h, const struct target *t,
                                          bool features, uint8_t *bytes, size_t len)
{
    const char *format = t->file ? t->format : NULL;
    size_t at = target_header_length(h, t);
    bool placed = !format;
    bool had = false;
    bool fits = true;
    bool named = !t->base.data_file;

    for (unsigned i = 0; i < h->extension_count; i++)
        had |= h->extensions[i].type == QCOW2_EXTENSION_BACKING_FORMAT;
    if (!placed && !had)
        fits = qcow2_header_append(bytes, len, &at, QCOW2_EXTENSION_BACKING_FORMAT, format,
                                   strlen(format));
    for (unsigned i = 0; i < h->extension_count && fits; i++) {
        const struct qcow2_extension *e = &h->extensions[i];

        if (e->type == QCOW2_EXTENSION_BACKING_FORMAT) {
            if (!placed)
                fits = qcow2_header_append(bytes, len, &at, e->type, format, strlen(format));
            placed = true;
        } else if (e->type == QCOW2_EXTENSION_DATA_FILE && t->base.data_file) {
            named = true;
            fits = qcow2_header_append(bytes, len, &at, e->type, t->base.data_file,
                                       strlen(t->base.data_file));
        } else if (!is_left_out(t, e->type, features)) {
            fits = qcow2_header_append(bytes, len, &at, e->type, e->data, e->len);
        }
    }
    if (fits && !named)
        fits = qcow2_header_append(bytes, len, &at, QCOW2_EXTENSION_DATA_FILE, t->base.data_file,
                                   strlen(t->base.data_file));
    if (fits)
        fits = qcow2_header_append(bytes, len, &at, QCOW2_EXTENSION_END, NULL, 0);
    return fits ? at : 0;
}

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Do `old` and `bytes` agree on all that the old header uses beyond the first sector? */
static bool qcow2_header_keeps(const struct used *u, const uint8_t *old, const uint8_t *bytes)
{
    size_t name = max_size(u->name, QCOW2_HEADER_SECTOR);

    if (u->extensions_end > QCOW2_HEADER_SECTOR &&
        memcmp(old + QCOW2_HEADER_SECTOR, bytes + QCOW2_HEADER_SECTOR,
               u->extensions_end - QCOW2_HEADER_SECTOR) != 0)
        return false;
    return u->name_end <= name || memcmp(old + name, bytes + name, u->name_end - name) == 0;
}

/* Where a name of `len` bytes has room: behind the extensions, clear of the old name. 0: nowhere. */
static size_t qcow2_header_name_place(const struct used *u, size_t extensions_end, size_t name_len,
                                      size_t len)
{
    size_t at = max_size(extensions_end, u->extensions_end);

    if (at < u->name_end && at + name_len > u->name)
        at = u->name_end;
    return range_within(at, name_len, len) ? at : 0;
}

static bool qcow2_header_try(const struct qcow2_header *h, const uint8_t *old, size_t len,
                             const struct target *t, bool features, uint8_t *ret)
{
    struct used u = qcow2_header_used(h, old);
    size_t name_len = t->file ? strlen(t->file) : 0;
    size_t place = 0;
    size_t end;

    memcpy(ret, old, len);
    qcow2_header_put_version(h, t, ret);
    end = qcow2_header_put_extensions(h, t, features, ret, len);
    if (!end)
        return false;
    if (t->file) {
        place = qcow2_header_name_place(&u, end, name_len, len);
        if (!place)
            return false;
        memcpy(ret + place, t->file, name_len);
    }
    store_be64(ret + QCOW2_OFFSET_BACKING_FILE_OFFSET, place);
    store_be32(ret + QCOW2_OFFSET_BACKING_FILE_SIZE, (uint32_t)name_len);
    return qcow2_header_keeps(&u, old, ret);
}

int qcow2_header_with_backing(const struct qcow2_header *header, const void *old, size_t len,
                              const char *file, const char *format, void *ret, struct error **err)
{
    const struct target t = {
        .base = {.version = header->version, .compatible = header->compatible},
        .file = file,
        .format = format,
    };

    if (file && (!*file || strlen(file) > QCOW2_BACKING_FILE_MAX))
        return error_set(err, EINVAL, "the backing file name has %zu bytes, expected 1 to %d",
                         strlen(file), QCOW2_BACKING_FILE_MAX);
    if (file && format && strlen(format) > QCOW2_BACKING_FORMAT_MAX)
        return error_set(err, EINVAL, "the backing format name has %zu bytes, expected %d at most",
                         strlen(format), QCOW2_BACKING_FORMAT_MAX);
    if (file && qcow2_header_data_is_raw(header))
        return error_set(
            err, EINVAL,
            "the image has a raw data file, which holds all of the disk: it cannot have a "
            "backing file");
    if (!qcow2_header_try(header, old, len, &t, true, ret) &&
        !qcow2_header_try(header, old, len, &t, false, ret))
        return error_set(err, ENOSPC,
                         "the header has no room to name backing file '%s' without putting the old "
                         "one at risk",
                         file ? file : "");
    return 0;
}

int qcow2_header_rewrite(const struct qcow2_header *header, const void *old, size_t len,
                         const struct qcow2_header_new *new, void *ret, struct error **err)
{
    const struct target t = {*new, header->backing_file, header->backing_format};

    if (!qcow2_header_try(header, old, len, &t, true, ret) &&
        !qcow2_header_try(header, old, len, &t, false, ret))
        return error_set(
            err, ENOSPC,
            "the header has no room for the change without putting what it has at risk");
    return 0;
}
