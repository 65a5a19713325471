/* SPDX-License-Identifier: Apache-2.0 */
/* cairn info: what an image's header says. The image itself is not opened, so that one of any kind can be looked at. */
#include "base/alloc.h"
#include "base/json-text.h"
#include "base/macros.h"
#include "cli/image/info-luks.h"
#include "cli/image/info.h"
#include "cli/image/tool.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct info {
    struct image_spec spec;
    bool json;
    bool chain;
};

static bool is_qcow2(const struct image_layer *l)
{
    return l->header.version != 0;
}

static bool is_luks(const struct image_layer *l)
{
    return strcmp(l->format, "luks") == 0;
}

static bool is_encrypted(const struct image_layer *l)
{
    return is_luks(l) || l->header.crypt_method;
}

static uint64_t virtual_size(const struct image_layer *l)
{
    if (l->imported)
        return l->imported_size;
    return is_qcow2(l) ? l->header.size : (l->file_size - l->luks_payload + 511) & ~(uint64_t)511;
}

/* 0: there is none */
static uint64_t cluster_size(const struct image_layer *l)
{
    return is_qcow2(l) ? qcow2_header_cluster_size(&l->header) : l->imported_cluster;
}

static const char *compression(const struct qcow2_header *h)
{
    return h->compression_type == QCOW2_COMPRESSION_ZSTD ? "zstd" : "zlib";
}

static json_t *specific_json(const struct image_layer *l, const struct info_tables *t)
{
    const struct qcow2_header *h = &l->header;
    json_t *data = json_pack("{s:s, s:s}", "compat", h->version == 2 ? "0.10" : "1.1",
                             "compression-type", compression(h));

    if (h->version >= 3)
        json_object_set_new(data, "lazy-refcounts",
                            json_boolean(h->compatible & QCOW2_COMPATIBLE_LAZY_REFCOUNTS));
    json_object_set_new(data, "refcount-bits", json_integer((json_int_t)1 << h->refcount_order));
    if (h->data_file)
        json_object_set_new(data, "data-file", json_string_lossy(h->data_file));
    if (qcow2_header_has_data_file(h))
        json_object_set_new(data, "data-file-raw",
                            json_boolean(h->autoclear & QCOW2_AUTOCLEAR_RAW_DATA));
    if (h->version >= 3) {
        json_object_set_new(data, "corrupt",
                            json_boolean(h->incompatible & QCOW2_INCOMPATIBLE_CORRUPT));
        json_object_set_new(data, "extended-l2",
                            json_boolean(h->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2));
    }
    if (json_array_size(t->bitmaps))
        json_object_set(data, "bitmaps", t->bitmaps);
    if (h->crypt_method == QCOW2_CRYPT_AES)
        json_object_set_new(data, "encrypt", json_pack("{s:s}", "format", "aes"));
    if (t->luks)
        json_object_set(data, "encrypt", t->luks);
    return json_pack("{s:s, s:o}", "type", "qcow2", "data", data);
}

static json_t *layer_json(const struct image_layer *l, const struct info_tables *t)
{
    json_t *o = json_object();

    if (l->backing_format)
        json_object_set_new(o, "backing-filename-format", json_string_lossy(l->backing_format));
    json_object_set_new(o, "virtual-size", json_from_uint(virtual_size(l)));
    json_object_set_new(o, "filename", json_string_lossy(l->filename));
    if (cluster_size(l))
        json_object_set_new(o, "cluster-size", json_from_uint(cluster_size(l)));
    json_object_set_new(o, "format", json_string(l->format));
    json_object_set_new(o, "actual-size", json_from_uint(l->disk_bytes));
    if (is_encrypted(l))
        json_object_set_new(o, "encrypted", json_true());
    if (json_array_size(t->snapshots))
        json_object_set(o, "snapshots", t->snapshots);
    if (is_qcow2(l))
        json_object_set_new(o, "format-specific", specific_json(l, t));
    if (t->vmdk)
        json_object_set(o, "format-specific", t->vmdk);
    if (is_luks(l))
        json_object_set_new(o, "format-specific",
                            json_pack("{s:s, s:O}", "type", "luks", "data", t->luks));
    if (l->backing_filename) {
        json_object_set_new(o, "full-backing-filename", json_string_lossy(l->backing_filename));
        json_object_set_new(o, "backing-filename", json_string_lossy(l->header.backing_file));
    }
    json_object_set_new(o, "dirty-flag",
                        json_boolean(l->header.incompatible & QCOW2_INCOMPATIBLE_DIRTY));
    return o;
}

static const char *yes(uint64_t bits)
{
    return bits ? "true" : "false";
}

void info_print_specific(const struct image_layer *l, const struct info_tables *t)
{
    const struct qcow2_header *h = &l->header;

    printf("Format specific information:\n");
    printf("    compat: %s\n", h->version == 2 ? "0.10" : "1.1");
    printf("    compression type: %s\n", compression(h));
    if (h->version >= 3)
        printf("    lazy refcounts: %s\n", yes(h->compatible & QCOW2_COMPATIBLE_LAZY_REFCOUNTS));
    info_print_bitmaps(t->bitmaps);
    printf("    refcount bits: %u\n", 1u << h->refcount_order);
    if (h->data_file)
        printf("    data file: %s\n", h->data_file);
    if (qcow2_header_has_data_file(h))
        printf("    data file raw: %s\n", yes(h->autoclear & QCOW2_AUTOCLEAR_RAW_DATA));
    if (h->crypt_method)
        printf("    encrypt:\n");
    if (h->crypt_method == QCOW2_CRYPT_AES)
        printf("        format: aes\n");
    if (t->luks)
        info_print_luks(t->luks, "        ");
    if (h->version < 3)
        return;
    printf("    corrupt: %s\n", yes(h->incompatible & QCOW2_INCOMPATIBLE_CORRUPT));
    printf("    extended l2: %s\n", yes(h->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2));
}

static void print_layer(const struct image_layer *l, const struct info_tables *t)
{
    char size[32];
    char disk[32];

    tool_size_text(size, sizeof(size), virtual_size(l));
    tool_size_text(disk, sizeof(disk), l->disk_bytes);
    printf("image: %s\n", l->filename);
    printf("file format: %s\n", l->format);
    printf("virtual size: %s (%" PRIu64 " bytes)\n", size, virtual_size(l));
    printf("disk size: %s\n", disk);
    if (is_encrypted(l))
        printf("encrypted: yes\n");
    if (cluster_size(l))
        printf("cluster_size: %" PRIu64 "\n", cluster_size(l));
    if (l->header.incompatible & QCOW2_INCOMPATIBLE_DIRTY)
        printf("cleanly shut down: no\n");
    if (l->backing_filename) {
        printf("backing file: %s", l->header.backing_file);
        if (strcmp(l->header.backing_file, l->backing_filename) != 0)
            printf(" (actual path: %s)", l->backing_filename);
        printf("\n");
    }
    if (l->backing_format)
        printf("backing file format: %s\n", l->backing_format);
    info_print_snapshots(t->snapshots);
    if (is_qcow2(l))
        info_print_specific(l, t);
    info_print_vmdk(t->vmdk);
    if (is_luks(l)) {
        printf("Format specific information:\n");
        info_print_luks(t->luks, "    ");
    }
}

static int co_fn control_fn info(struct graph *g, void *arg, struct error **err)
{
    struct info *i = arg;
    struct image image;
    json_t *all = json_array();
    int r = image_co_open(&image, g, "i", &i->spec, err);

    for (size_t n = 0; r == 0 && n < image.count; n++)
        r = info_co_refuse_writers(g, &image.layers[n], err); /* before anything is printed */
    for (size_t n = 0; r == 0 && n < image.count; n++) {
        struct image_layer *l = &image.layers[n];
        struct info_tables tables = {.snapshots = NULL};

        r = info_tables_co_read(&tables, g, l, err);
        if (r == 0 && i->json)
            json_array_append_new(all, layer_json(l, &tables));
        else if (r == 0) {
            printf(n ? "\n" : "");
            print_layer(l, &tables);
        }
        info_tables_release(&tables);
    }
    if (r == 0 && i->json) {
        AUTO(free_ptr)
        char *text = json_dumps(i->chain ? all : json_array_get(all, 0), JSON_INDENT(4));

        (void)puts(text ? text : "null");
    }
    json_decref(all);
    image_co_close(&image);
    return r;
}

static int read_option(struct info *i, int opt, struct error **err)
{
    switch (opt) {
    case TOOL_OUTPUT:
        return tool_read_output(optarg, &i->json, err);
    case TOOL_FIRST_FREE:
        i->chain = true;
        return 0;
    default:
        return tool_image_option(&i->spec, opt);
    }
}

static int info_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"format", required_argument, NULL, 'f'},
        {"output", required_argument, NULL, TOOL_OUTPUT},
        {"backing-chain", no_argument, NULL, TOOL_FIRST_FREE},
        {"force-share", no_argument, NULL, 'U'},
        {NULL, 0, NULL, 0},
    };
    struct info i = {.spec.flags = IMAGE_HEADERS};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:U", options, err)) != -1)
        r = read_option(&i, opt, err);
    if (r == 0)
        r = tool_only_image(&i.spec, argc, argv, err);
    if (r < 0)
        return r;
    i.spec.flags |= i.chain ? 0 : IMAGE_NO_BACKING;
    return tool_run(info, &i, err);
}

const struct cli_command info_command = {
    .name = "info",
    .summary = "say what an image is",
    .arguments = "[OPTION]... FILE",
    .help =
        "Says format, size and backing file of an image.\n"
        "\n"
        "  -f FORMAT            of FILE: raw, qcow2, vdi, vhdx, vmdk, vpc; by default it is probed\n"
        "      --backing-chain  all images down to the last backing file\n"
        "      --output FORMAT  human (default) or json\n"
        "      --image-opts     FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -U, --force-share    although others write to it\n"
        "      --allow DIR      what images refer to may lie in DIR, too\n"
        "  -h, --help           say this and exit\n",
    .is_image_tool = true,
    .run = info_run,
};
