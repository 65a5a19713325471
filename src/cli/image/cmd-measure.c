/* SPDX-License-Identifier: Apache-2.0 */
/* cairn measure: how much space a new image needs. */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/json-text.h"
#include "base/macros.h"
#include "cli/image/create-options.h"
#include "cli/image/extent-walk.h"
#include "cli/image/image-bitmaps.h"
#include "cli/image/tool.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct measure {
    struct image_spec spec; /* name NULL: a size is given */
    const char *format;
    char *options;
    bool has_size;
    uint64_t size;
    bool json;

    struct create_options o;
    uint64_t data_bytes; /* what holds data, in whole units of the target */
    bool has_bitmaps;    /* source and target can have some */
    uint64_t bitmaps;    /* what they take in the new image */
    uint64_t required;
    uint64_t full;
};

/* Data in whole units, each counted once. */
static int co_fn count_data(struct measure *m, struct backend *b, uint64_t unit, struct error **err)
{
    struct extent_walk walk = {.backend = b};
    uint64_t counted = 0; /* up to here */

    for (uint64_t at = 0; at < backend_size(b);) {
        struct extent e;
        int r = extent_walk_at(&walk, at, backend_size(b) - at, &e);

        if (r < 0)
            return error_set(err, -r, "Failed to read block status: %s", strerror(-r));
        if (e.flags & EXTENT_DATA && !(e.flags & EXTENT_ZERO)) {
            uint64_t from = MAX(align_down(at, unit), counted);

            counted = MAX(align_up(at + e.len, unit), from);
            m->data_bytes += counted - from;
        }
        at += e.len;
        if (cli_interrupted())
            return cli_interrupted_error(err);
    }
    return 0;
}

static int co_fn control_fn look_at_source(struct graph *g, void *arg, struct error **err)
{
    struct measure *m = arg;
    uint64_t unit = strcmp(m->format, "qcow2") == 0 ? m->o.cluster_size : 512;
    struct image image;
    int r = image_co_open(&image, g, "i", &m->spec, err);

    if (r == 0) {
        const struct image_layer *top = &image.layers[0];

        m->size = image_size(&image);
        m->has_bitmaps = strcmp(m->format, "qcow2") == 0 && top->header.version >= 3;
        if (m->has_bitmaps)
            m->bitmaps = image_bitmaps_size(&image, m->o.cluster_size);
    }
    if (r == 0)
        r = count_data(m, image.backend, unit, err);
    image_co_close(&image);
    return r;
}

static int compute(struct measure *m, struct error **err)
{
    struct qcow2_layout layout;
    AUTO(free_ptr) char *backing = take(&m->o.backing_file);
    enum preallocation preallocation = m->o.preallocation;
    int r;

    if (strcmp(m->format, "raw") == 0) {
        m->required = m->full = align_up(m->size, 512);
        return 0;
    }
    if (m->o.encryption.detached)
        return error_set(err, EINVAL, "detached-header: the disk is another file, as it is");
    if (strcmp(m->format, "luks") == 0) {
        r = create_options_luks_len(&m->o, &m->full, err);
        m->required = m->full += align_up(m->size, 512);
        return r;
    }
    free(take(&m->o.backing_format));
    free(take(&m->o.data_file)); /* as the peer: all is counted, wherever it will lie */
    m->o.data_file_raw = false;
    m->o.size = m->size;
    m->o.preallocation = PREALLOC_METADATA; /* metadata for all of the disk */
    r = create_options_layout(&m->o, &layout, err);
    if (r < 0)
        return r;
    m->full = layout.file_size;
    if (preallocation == PREALLOC_FALLOC || preallocation == PREALLOC_FULL ||
        (backing && m->spec.name))
        m->required = m->full; /* how much a backing file saves is not known */
    else
        m->required = layout.data_offset + m->data_bytes;
    return 0;
}

static void print(const struct measure *m)
{
    if (m->json) {
        json_t *o = json_object();
        AUTO(free_ptr) char *text = NULL;

        if (m->has_bitmaps)
            json_object_set_new(o, "bitmaps", json_from_uint(m->bitmaps));
        json_object_set_new(o, "required", json_from_uint(m->required));
        json_object_set_new(o, "fully-allocated", json_from_uint(m->full));
        text = json_dumps(o, JSON_INDENT(4));
        (void)puts(text ? text : "null");
        json_decref(o);
        return;
    }
    printf("required size: %" PRIu64 "\nfully allocated size: %" PRIu64 "\n", m->required, m->full);
    if (m->has_bitmaps)
        printf("bitmaps size: %" PRIu64 "\n", m->bitmaps);
}

static int run(struct measure *m, struct error **err)
{
    int r = create_options_init(&m->o, m->format, err);

    if (r == 0 && m->options)
        r = create_options_read(&m->o, m->options, err);
    if (r == 0 && m->spec.name)
        r = tool_run(look_at_source, m, err);
    if (r == 0)
        r = compute(m, err);
    if (r == 0)
        print(m);
    create_options_release(&m->o);
    return r;
}

static int read_option(struct measure *m, int opt, struct error **err)
{
    switch (opt) {
    case 'O':
        m->format = optarg;
        return 0;
    case 'o':
        return tool_join_options(&m->options, optarg, err);
    case 'l':
        m->spec.snapshot = optarg;
        return 0;
    case TOOL_OUTPUT:
        return tool_read_output(optarg, &m->json, err);
    case TOOL_FIRST_FREE:
        m->has_size = true;
        return tool_read_size("image size", optarg, &m->size, err);
    default:
        return tool_image_option(&m->spec, opt);
    }
}

static int measure_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"output", required_argument, NULL, TOOL_OUTPUT},
        {"size", required_argument, NULL, TOOL_FIRST_FREE},
        {"force-share", no_argument, NULL, 'U'},
        {NULL, 0, NULL, 0},
    };
    struct measure m = {.format = "raw"};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:O:o:l:U", options, err)) != -1)
        r = read_option(&m, opt, err);
    if (r == 0 && m.options && image_format_known(m.format) &&
        create_options_help(m.format, m.options)) {
        free(m.options);
        return 0;
    }
    if (r == 0 && argc - optind > 1)
        r = error_set(err, EINVAL, "At most one filename argument is allowed.");
    if (r == 0 && m.has_size && argc > optind)
        r = error_set(err, EINVAL, "--size N cannot be used together with a filename.");
    if (r == 0 && !m.has_size && argc == optind)
        r = error_set(err, EINVAL, "Either --size N or one filename must be specified.");
    if (r == 0 && m.has_size && m.spec.snapshot)
        r = error_set(err, EINVAL, "-l requires a filename argument.");
    if (r == 0)
        r = tool_check_format(&m.spec, err);
    if (r == 0) {
        m.spec.name = argv[optind]; /* or NULL */
        cli_catch_signals();
        r = run(&m, err);
    }
    free(m.options);
    return r;
}

const struct cli_command measure_command = {
    .name = "measure",
    .summary = "say how much space an image would need",
    .arguments = "[OPTION]... (--size SIZE | FILE)",
    .help =
        "Says how large the file of a new image would be: with the data of FILE or none, and full.\n"
        "\n"
        "  -f FORMAT, -O FORMAT  of FILE (by default it is probed), of the new image (raw, the default, or qcow2)\n"
        "  -o OPTION,...         of the new image's format; `-o help` lists them\n"
        "      --size SIZE       of a new, empty disk\n"
        "      --output FORMAT   human (default) or json\n"
        "      --image-opts      FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -l SNAPSHOT           the disk as an internal snapshot of FILE has it: an ID, a name, or\n"
        "                        snapshot.id=ID,snapshot.name=NAME\n"
        "  -U, --force-share     although others write to FILE\n"
        "      --allow DIR       what images refer to may lie in DIR, too\n"
        "  -h, --help            say this and exit\n",
    .is_image_tool = true,
    .run = measure_run,
};
