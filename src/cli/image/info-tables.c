/* SPDX-License-Identifier: Apache-2.0 */
/* Reading the tables of snapshots and bitmaps, entry by entry. */
#include "cli/image/info-tables.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/json-text.h"
#include "base/macros.h"
#include "cli/image/info-luks.h"
#include "cli/image/tool.h"
#include "formats/qcow2/qcow2-snapshot.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A table in the file, read as a whole. */
struct table {
    uint8_t *bytes;
    size_t len;
    size_t at; /* the next entry */
};

static int co_fn control_fn read_table(struct table *t, struct graph *g,
                                       const struct image_layer *layer, uint64_t offset,
                                       uint64_t len, struct error **err)
{
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct backend *b;
    int r;

    if (offset >= layer->file_size)
        return error_set(err, EINVAL, "'%s': a table lies beyond the end of the file",
                         layer->filename);
    t->len = (size_t)MIN(len, layer->file_size - offset);
    t->bytes = try_new_n(uint8_t, t->len);
    if (!t->bytes)
        return error_set(err, ENOMEM, "no memory");
    r = image_co_backend(&b, g, layer->file_node, access, err);
    if (r < 0)
        return r;
    for (size_t at = 0; r == 0 && at < t->len;) {
        size_t n = MIN(t->len - at, (size_t)BACKEND_MAX_DATA);

        r = image_co_read(b, offset + at, t->bytes + at, n, NULL);
        at += n;
    }
    (void)backend_co_free(b);
    return r < 0 ? error_set(err, -r, "cannot read '%s': %s", layer->filename, strerror(-r)) : 0;
}

/* The next entry of `fixed` bytes and what follows it; NULL if the table ends before. */
static const uint8_t *next_entry(struct table *t, size_t fixed, size_t variable)
{
    const uint8_t *entry = t->bytes + t->at;

    if (!range_within(t->at, fixed + variable, t->len))
        return NULL;
    t->at = (size_t)align_up(t->at + fixed + variable, 8);
    return entry;
}

static bool has_fixed(const struct table *t, size_t fixed)
{
    return range_within(t->at, fixed, t->len);
}

static json_t *text_of(const void *bytes, size_t len)
{
    AUTO(free_ptr) char *copy = xasprintf("%.*s", (int)len, (const char *)bytes);

    return json_string_lossy(copy);
}

/* ---- snapshots ---- */

static json_t *snapshot_json(const struct qcow2_snapshot *s)
{
    json_t *o = json_object();

    if (s->has_icount && s->icount != UINT64_MAX)
        json_object_set_new(o, "icount", json_from_uint(s->icount));
    json_object_set_new(o, "vm-clock-nsec", json_from_uint(s->vm_clock_ns % NS_PER_S));
    json_object_set_new(o, "name", text_of(s->name, s->name_len));
    json_object_set_new(o, "date-sec", json_from_uint(s->date_s));
    json_object_set_new(o, "date-nsec", json_from_uint(s->date_ns));
    json_object_set_new(o, "vm-clock-sec", json_from_uint(s->vm_clock_ns / NS_PER_S));
    json_object_set_new(o, "id", text_of(s->id, s->id_len));
    json_object_set_new(o, "vm-state-size", json_from_uint(s->vm_state_size));
    return o;
}

static int co_fn control_fn read_snapshots(struct info_tables *ret, struct graph *g,
                                           const struct image_layer *layer, struct error **err)
{
    const struct qcow2_header *h = &layer->header;
    struct table t = {.bytes = NULL};
    int r = read_table(&t, g, layer, h->snapshots_offset, QCOW2_SNAPSHOTS_BYTES_MAX, err);

    ret->snapshots = json_array();
    for (uint32_t i = 0; r == 0 && i < h->snapshot_count; i++) {
        struct qcow2_snapshot s;

        if (qcow2_snapshot_parse(t.bytes, t.len, t.at, &s) < 0)
            break;
        json_array_append_new(ret->snapshots, snapshot_json(&s));
        t.at = (size_t)align_up(t.at + s.len, 8);
    }
    if (r == 0 && json_array_size(ret->snapshots) < h->snapshot_count)
        cli_warn("'%s': entry %zu of its table of snapshots, which has %" PRIu32
                 ", is broken: `cairn check -r all` drops it",
                 layer->filename, json_array_size(ret->snapshots), h->snapshot_count);
    free(t.bytes);
    return r;
}

static json_int_t number(const json_t *o, const char *key)
{
    return json_integer_value(json_object_get(o, key));
}

static const char *text(const json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));

    return s ? s : "";
}

void info_print_snapshots(const json_t *snapshots)
{
    size_t i;
    const json_t *s;

    if (!json_array_size(snapshots))
        return;
    printf("Snapshot list:\n%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE",
           "VM CLOCK", "ICOUNT");
    json_array_foreach(snapshots, i, s)
    {
        time_t date = (time_t)number(s, "date-sec");
        json_int_t clock = number(s, "vm-clock-sec");
        char icount[32] = "";
        char size[32];
        char when[32];
        char ran[64];
        struct tm tm;

        tool_size_text(size, sizeof(size), (uint64_t)number(s, "vm-state-size"));
        (void)localtime_r(&date, &tm);
        (void)strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%S", &tm);
        (void)snprintf(ran, sizeof(ran), "%02lld:%02lld:%02lld.%03lld", (long long)(clock / 3600),
                       (long long)(clock / 60 % 60), (long long)(clock % 60),
                       (long long)(number(s, "vm-clock-nsec") / 1000000));
        if (json_object_get(s, "icount"))
            (void)snprintf(icount, sizeof(icount), "%lld", (long long)number(s, "icount"));
        printf("%-9s %-16s %8s%20s%13s%11s\n", text(s, "id"), text(s, "name"), size, when, ran,
               icount);
    }
}

/* ---- bitmaps ---- */

static json_t *bitmap_json(const uint8_t *e, size_t extra)
{
    uint32_t flags = load_be32(e + 12);
    json_t *names = json_array();

    if (flags & 1)
        json_array_append_new(names, json_string("in-use"));
    if (flags & 2)
        json_array_append_new(names, json_string("auto"));
    return json_pack("{s:o, s:o, s:I}", "flags", names, "name",
                     text_of(e + QCOW2_BITMAP_ENTRY_LEN_MIN + extra, load_be16(e + 18)),
                     "granularity", (json_int_t)1 << MIN(e[17], 62));
}

static int co_fn control_fn read_bitmaps(struct info_tables *ret, struct graph *g,
                                         const struct image_layer *layer, struct error **err)
{
    const struct qcow2_header *h = &layer->header;
    struct table t = {.bytes = NULL};
    int r = read_table(&t, g, layer, h->bitmap_directory_offset, h->bitmap_directory_size, err);

    ret->bitmaps = json_array();
    for (uint32_t i = 0; r == 0 && i < h->bitmap_count; i++) {
        const uint8_t *e = t.bytes + t.at;
        size_t extra = has_fixed(&t, QCOW2_BITMAP_ENTRY_LEN_MIN) ? load_be32(e + 20) : 0;

        if (!has_fixed(&t, QCOW2_BITMAP_ENTRY_LEN_MIN) ||
            !next_entry(&t, QCOW2_BITMAP_ENTRY_LEN_MIN, extra + load_be16(e + 18)))
            break;
        json_array_append_new(ret->bitmaps, bitmap_json(e, extra));
    }
    if (r == 0 && json_array_size(ret->bitmaps) < h->bitmap_count)
        cli_warn("'%s': entry %zu of its directory of bitmaps, which has %" PRIu32
                 ", is broken: `cairn check -r all` drops them",
                 layer->filename, json_array_size(ret->bitmaps), h->bitmap_count);
    free(t.bytes);
    return r;
}

void info_print_bitmaps(const json_t *bitmaps)
{
    size_t i;
    size_t k;
    const json_t *b;
    const json_t *flag;

    if (!json_array_size(bitmaps))
        return;
    printf("    bitmaps:\n");
    json_array_foreach(bitmaps, i, b)
    {
        printf("        [%zu]:\n            flags:\n", i);
        json_array_foreach(json_object_get(b, "flags"), k, flag)
            printf("                [%zu]: %s\n", k, json_string_value(flag));
        printf("            name: %s\n            granularity: %lld\n", text(b, "name"),
               (long long)number(b, "granularity"));
    }
}

int info_co_refuse_writers(struct graph *g, const struct image_layer *layer, struct error **err)
{
    struct access access = {.wants = ACCESS_READ,
                            .tolerates = ACCESS_READ | ACCESS_WRITE_UNCHANGED};
    struct backend *b = NULL;
    int r = 0;

    if (layer->header.version)
        r = image_co_backend(&b, g, layer->file_node, access, err);
    (void)backend_co_free(b);
    return r < 0 ? error_wrap(err, r, "Could not open '%s'", layer->filename) : 0;
}

int info_tables_co_read(struct info_tables *ret, struct graph *g, const struct image_layer *layer,
                        struct error **err)
{
    int r = 0;

    *ret = (struct info_tables){.snapshots = NULL};
    if (layer->header.snapshots_problem)
        cli_warn("'%s': its snapshots cannot be used: %s", layer->filename,
                 layer->header.snapshots_problem);
    if (layer->header.bitmaps_problem)
        cli_warn("'%s': its bitmaps cannot be used: %s", layer->filename,
                 layer->header.bitmaps_problem);
    if (layer->header.snapshot_count)
        r = read_snapshots(ret, g, layer, err);
    if (r == 0 && layer->header.has_bitmaps && layer->header.bitmap_count)
        r = read_bitmaps(ret, g, layer, err);
    if (r == 0)
        r = info_luks_co_read(&ret->luks, g, layer, err);
    if (strcmp(layer->format, "vmdk") == 0)
        ret->vmdk = info_vmdk_json(graph_find(g, layer->node), layer);
    return r;
}

void info_tables_release(struct info_tables *t)
{
    json_decref(t->snapshots);
    json_decref(t->bitmaps);
    json_decref(t->luks);
    json_decref(t->vmdk);
}
