/* SPDX-License-Identifier: Apache-2.0 */
/* cairn amend: another version, size, or width of refcounts for an image. */
#include "base/alloc.h"
#include "base/keyval.h"
#include "base/macros.h"
#include "base/number.h"
#include "cli/image/amend-keys.h"
#include "cli/image/tool.h"
#include "formats/qcow2/qcow2-amend.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct amend {
    struct image_spec spec;
    struct tool_cache cache;
    char *options; /* -o, all of them */
    bool progress;
    bool force;

    struct qcow2_amendment what;
    bool has_size;
    uint64_t size;
    const char *backing_file; /* in `tree` */
    const char *backing_format;
    json_t *tree;
    json_t *keys;        /* of key slots; in `tree`, or NULL */
    json_t *volume_keys; /* the same of a LUKS volume, whose options have no prefix; or NULL */
    bool only_keys;
    bool has_raw; /* data_file_raw is said */
    bool raw;
};

/* ---- -o ---- */

static int set_backing_file(struct amend *x, const char *text, struct error **err)
{
    (void)err;
    x->backing_file = text;
    return 0;
}

static int set_backing_format(struct amend *x, const char *text, struct error **err)
{
    (void)err;
    x->backing_format = text;
    return 0;
}

static int set_compat(struct amend *x, const char *text, struct error **err)
{
    if (strcmp(text, "0.10") == 0 || strcmp(text, "v2") == 0)
        x->what.version = 2;
    else if (strcmp(text, "1.1") == 0 || strcmp(text, "v3") == 0)
        x->what.version = 3;
    else if (*text)
        return error_set(err, EINVAL, "Unknown compatibility level %s", text);
    return 0;
}

static int set_data_file(struct amend *x, const char *text, struct error **err)
{
    if (!*text || strlen(text) > QCOW2_DATA_FILE_MAX)
        return error_set(err, EINVAL, "the name of the data file has %zu bytes, expected 1 to %d",
                         strlen(text), QCOW2_DATA_FILE_MAX);
    x->what.data_file = text;
    return 0;
}

static int set_data_file_raw(struct amend *x, const char *text, struct error **err)
{
    x->has_raw = true;
    return tool_read_bool("data_file_raw", text, &x->raw, err);
}

static int set_lazy_refcounts(struct amend *x, const char *text, struct error **err)
{
    x->what.change_lazy = true;
    return tool_read_bool("lazy_refcounts", text, &x->what.lazy_refcounts, err);
}

static int set_refcount_bits(struct amend *x, const char *text, struct error **err)
{
    uint64_t bits;

    if (number_from_text(text, &bits) < 0 || !bits || bits > 64 || (bits & (bits - 1)))
        return error_set(err, EINVAL,
                         "Refcount width must be a power of two and may not exceed 64 bits");
    x->what.refcount_bits = (unsigned)bits;
    return 0;
}

static int set_size(struct amend *x, const char *text, struct error **err)
{
    x->has_size = true;
    return tool_read_size("image size", text, &x->size, err);
}

static const struct {
    const char *name;
    int (*set)(struct amend *x, const char *text, struct error **err);
    const char *help;
} known[] = {
    {"backing_file", set_backing_file, "<str>     - File name of a base image"},
    {"backing_fmt", set_backing_format, "<str>      - Image format of the base image"},
    {"compat", set_compat, "<str>           - Compatibility level (v2 [0.10] or v3 [1.1])"},
    {"data_file", set_data_file, "<str>        - File name of an external data file"},
    {"data_file_raw", set_data_file_raw,
     "<bool (on/off)> - The external data file must stay valid as a raw image"},
    {"lazy_refcounts", set_lazy_refcounts, "<bool (on/off)> - Postpone refcount updates"},
    {"refcount_bits", set_refcount_bits, "<num>    - Width of a reference count entry in bits"},
    {"size", set_size, "<size>            - Virtual disk size"},
};

static void print_options(const char *format)
{
    printf("Amend options for '%s':\n", format);
    if (strcmp(format, "luks") == 0) {
        amend_keys_help("");
        return;
    }
    for (size_t i = 0; i < ARRAY_SIZE(known); i++)
        printf("  %s=%s\n", known[i].name, known[i].help);
    amend_keys_help("encrypt.");
}

static int set_key_option(struct amend *x, const char *key, json_t *value)
{
    if (!x->volume_keys)
        x->volume_keys = json_object();
    return json_object_set(x->volume_keys, key, value) == 0 ? 0 : -ENOMEM;
}

static int set_one(struct amend *x, const char *key, json_t *value, struct error **err)
{
    const char *text = json_string_value(value);

    for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
        if (strcmp(key, known[i].name) == 0)
            return text ? known[i].set(x, text, err)
                        : error_set(err, EINVAL, "Invalid parameter '%s'", key);
    }
    if (strcmp(key, "encrypt") == 0 && json_is_object(value)) {
        x->keys = value;
        return amend_keys_check(value, err);
    }
    if (text && amend_keys_is_option(key))
        return set_key_option(x, key, value);
    return error_set(err, EINVAL, "Invalid parameter '%s': it cannot be amended", key);
}

static int read_all(struct amend *x, struct error **err)
{
    enum json_in_mode mode;
    const char *key;
    json_t *value;
    int r;

    if (!*x->options)
        return error_set(err, EINVAL, "Invalid option list: it is empty");
    r = keyval_load(x->options, NULL, &x->tree, &mode, err);
    if (r < 0)
        return error_wrap(err, r, "Invalid option list");
    json_object_foreach(x->tree, key, value)
    {
        r = set_one(x, key, value, err);
        if (r < 0)
            return r;
    }
    x->only_keys = json_object_size(x->tree) == (x->keys ? 1 : json_object_size(x->volume_keys));
    return x->volume_keys ? amend_keys_check(x->volume_keys, err) : 0;
}

static bool wants_help(const char *options)
{
    return strcmp(options, "help") == 0 || strcmp(options, "?") == 0;
}

/* ---- doing it ---- */

/* A backing file may only be named as it is, with its format: who names another one must look after the content. */
static int check_backing(const struct amend *x, const struct qcow2_header *h, struct error **err)
{
    const char *file = h->backing_file ? h->backing_file : "";
    const char *format = h->backing_format ? h->backing_format : "";

    if ((x->backing_file || x->backing_format) &&
        (!x->backing_file || strcmp(x->backing_file, file) != 0 || !x->backing_format ||
         strcmp(x->backing_format, format) != 0))
        return error_set(err, EINVAL,
                         "Cannot amend the backing file: rebase gives an image another one");
    return 0;
}

/* Data that was not raw is not known to be so. */
static int check_data_file(const struct amend *x, const struct qcow2_header *h, struct error **err)
{
    if (x->what.data_file && !qcow2_header_has_data_file(h))
        return error_set(err, EINVAL,
                         "data-file can only be set for images that use an external data file");
    if (x->raw && !qcow2_header_data_is_raw(h))
        return error_set(err, EINVAL, "data-file-raw cannot be set on existing images");
    return 0;
}

/* What can be seen in the header is refused before the image is opened for writing. */
static int co_fn control_fn check_first(struct graph *g, const struct amend *x, struct error **err)
{
    struct image_spec spec = x->spec;
    const struct image_layer *top;
    struct image image;
    int r;

    spec.flags = IMAGE_HEADERS | IMAGE_NO_BACKING;
    r = image_co_open(&image, g, "h", &spec, err);
    if (r < 0)
        return r;
    image_warn_probed(&image);
    top = &image.layers[0];
    if (strcmp(top->format, "luks") == 0) {
        if (!x->volume_keys || !x->only_keys)
            r = error_set(err, EINVAL, "of a LUKS volume only key slots can be amended");
        image_co_close(&image);
        return r;
    }
    if (!top->header.version || strcmp(top->format, "qcow2") != 0)
        r = error_set(err, ENOTSUP, "Format driver '%s' does not support option amendment",
                      top->format);
    else if (x->volume_keys)
        r = error_set(err, EINVAL,
                      "key slots of a qcow2 image are amended by encrypt.state and so on");
    if (r == 0)
        r = check_backing(x, &top->header, err);
    if (r == 0)
        r = check_data_file(x, &top->header, err);
    if (r == 0 && x->what.version == 2)
        r = qcow2_check_downgrade(&top->header, err);
    image_co_close(&image);
    return r;
}

static int check_together(const struct amend *x, struct error **err)
{
    if (x->what.version != 2)
        return 0;
    if (x->what.lazy_refcounts)
        return error_set(err, ENOTSUP,
                         "Lazy refcounts only supported with compatibility level 1.1 and above "
                         "(use compat=1.1 or greater)");
    if (x->what.refcount_bits && x->what.refcount_bits != 16)
        return error_set(err, ENOTSUP,
                         "Refcount widths other than 16 bits require compatibility level 1.1 or "
                         "above (use compat=1.1 or greater)");
    return 0;
}

static int co_fn control_fn change(const struct amend *x, struct image *image, struct error **err)
{
    struct qcow2_amendment first = x->what;
    struct qcow2_amendment last = {.version = 2};
    int r = 0;

    if (x->keys || x->volume_keys)
        r = amend_keys_co(image, x->keys ? x->keys : x->volume_keys, x->force, err);
    if (r < 0 || x->only_keys)
        return r;
    if (first.version == 2)
        first.version = 0;
    first.data_not_raw = x->has_raw && !x->raw;
    r = qcow2_co_amend(image->backend, &first, err);
    if (r == 0 && x->has_size && x->size % 512)
        r = error_set(err, EINVAL, "The new size must be a multiple of 512");
    if (r == 0 && x->has_size)
        r = graph_co_resize(image->graph, image->layers[0].node, x->size, err);
    if (r == 0 && x->what.version == 2)
        r = qcow2_co_amend(image->backend, &last, err);
    if (r == 0 && image_co_flush(image->backend) < 0)
        r = error_set(err, EIO, "cannot flush '%s'", x->spec.name);
    return r;
}

static int co_fn control_fn amend(struct graph *g, void *arg, struct error **err)
{
    struct amend *x = arg;
    struct tool_progress bar;
    struct image image;
    int r = check_first(g, x, err);

    if (r == 0)
        r = image_co_open(&image, g, "i", &x->spec, err);
    if (r != 0)
        return r;
    tool_progress_begin(&bar, x->progress, 1);
    r = change(x, &image, err);
    tool_progress_end(&bar, r == 0);
    image_co_close(&image);
    return r;
}

enum { FORCE = TOOL_FIRST_FREE };

static int read_option(struct amend *x, int opt, struct error **err)
{
    switch (opt) {
    case 'o':
        return tool_join_options(&x->options, optarg, err);
    case 't':
        return tool_read_cache(optarg, &x->cache, err);
    case 'p':
        x->progress = true;
        return 0;
    case 'q':
        x->progress = false;
        return 0;
    case FORCE:
        x->force = true;
        return 0;
    default:
        return tool_image_option(&x->spec, opt);
    }
}

static int amend_with(struct amend *x, int argc, char **argv, struct error **err)
{
    int r;

    if (!x->options)
        return cli_usage(err, "Must specify options (-o)");
    if (wants_help(x->options) && x->spec.format && strcmp(x->spec.format, "qcow2") != 0 &&
        strcmp(x->spec.format, "luks") != 0)
        return error_set(err, ENOTSUP, "Format driver '%s' does not support option amendment",
                         x->spec.format);
    if (wants_help(x->options)) {
        print_options(x->spec.format ? x->spec.format : "qcow2");
        return 0;
    }
    r = tool_only_image(&x->spec, argc, argv, err);
    if (r == 0)
        r = read_all(x, err);
    if (r == 0)
        r = check_together(x, err);
    if (r < 0)
        return r;
    x->spec.flags |= x->cache.flags;
    return tool_run(amend, x, err);
}

static int amend_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"force", no_argument, NULL, FORCE},
        {NULL, 0, NULL, 0},
    };
    struct amend x = {.spec.flags = IMAGE_WRITE};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:o:t:pq", options, err)) != -1)
        r = read_option(&x, opt, err);
    if (r == 0)
        r = amend_with(&x, argc, argv, err);
    json_decref(x.tree);
    json_decref(x.volume_keys);
    free(x.options);
    return r;
}

const struct cli_command amend_command = {
    .name = "amend",
    .summary = "change the version, size or refcounts of an image",
    .arguments = "[OPTION]... -o OPTIONS FILE",
    .help =
        "Changes what a qcow2 image is besides its content, and which passwords open an encrypted image.\n"
        "\n"
        "  -o KEY=VALUE,...   compat=0.10|1.1, refcount_bits=1..64, lazy_refcounts=on|off, size=SIZE; -o help lists them\n"
        "                     encrypt.state=active,encrypt.new-secret=ID: one more password; encrypt.state=inactive with\n"
        "                     encrypt.old-secret=ID or encrypt.keyslot=N: one less. Of a LUKS volume without `encrypt.`\n"
        "  -f FORMAT          of FILE: qcow2 or luks; by default it is probed\n"
        "      --force        even if a password in use is overwritten, or none is left\n"
        "      --object secret,id=ID,file=PATH   a password\n"
        "  -t CACHE           of FILE (writeback): none, writeback, writethrough, directsync, unsafe\n"
        "  -p, -q             show progress; do not\n"
        "      --image-opts   FILE is options: driver=qcow2,file.filename=PATH\n"
        "      --allow DIR    what images refer to may lie in DIR, too\n"
        "  -h, --help         say this and exit\n",
    .is_image_tool = true,
    .run = amend_run,
};
