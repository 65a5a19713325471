/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cairn rebase: another backing file. What the disk shows through the old chain and would not show through the new one is written to
 * the image first, and is durable before the header names the new one (D2). With -u only the header is changed.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "base/zeroes.h"
#include "cli/image/extent-walk.h"
#include "cli/image/image-copy.h"
#include "cli/image/tool.h"
#include "formats/qcow2/qcow2-header-write.h"
#include "loop/iobuf.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define CHUNK ((uint64_t)2 << 20)

struct rebase {
    struct image_spec spec;
    const char *backing; /* as it will be named; "": none */
    const char *format;
    struct tool_cache cache;
    struct tool_cache source_cache;
    bool unsafe;
    bool compress;
    bool progress;

    struct image top;   /* with its old chain */
    struct image below; /* the new backing file, with its chain; not open if there is none */
    struct iobuf *old_data;
    struct iobuf *new_data;
    struct tool_progress bar;
};

static int co_fn read_new(struct rebase *x, uint64_t at, size_t len)
{
    if (!x->below.backend) {
        memset(x->new_data->data, 0, len);
        return 0;
    }
    return image_co_read(x->below.backend, at, x->new_data->data, len, x->new_data);
}

/*
 * Zeroes that hide what will lie below are either said for whole clusters of an image that has something below now, or written as
 * data: the format leaves alone what reads as zeroes already.
 */
static bool can_say_zero(const struct rebase *x, size_t len)
{
    const struct qcow2_header *h = &x->top.layers[0].header;

    return h->version >= 3 && h->backing_file && x->top.count > 1 &&
           len == qcow2_header_cluster_size(h);
}

/* Writes what differs, cluster by cluster. */
static int co_fn write_differences(struct rebase *x, uint64_t at, size_t len)
{
    uint64_t unit = qcow2_header_cluster_size(&x->top.layers[0].header);
    unsigned flags = x->cache.writethrough ? REQUEST_FUA : 0;
    unsigned compressed = x->compress ? REQUEST_COMPRESSED : 0;
    int r = 0;

    for (size_t from = 0; r == 0 && from < len;) {
        size_t to = (size_t)MIN(align_down(at + from, unit) + unit - at, (uint64_t)len);
        uint8_t *data = x->old_data->data + from;

        if (memcmp(data, x->new_data->data + from, to - from) == 0)
            r = 0;
        else if (can_say_zero(x, to - from) && is_all_zeroes(data, to - from))
            r = image_co_zero(x->top.backend, at + from, to - from, flags | REQUEST_MAY_UNMAP);
        else
            r = image_co_write(x->top.backend, at + from, data, to - from, flags | compressed,
                               x->old_data);
        from = to;
    }
    return r;
}

/* A range that the image itself does not hold. */
static int co_fn keep_range(struct rebase *x, uint64_t at, uint64_t len, struct error **err)
{
    for (uint64_t end = at + len; at < end;) {
        size_t n = (size_t)MIN(CHUNK, end - at);
        int r = image_co_read(x->top.backend, at, x->old_data->data, n, x->old_data);

        if (r < 0)
            return error_set(err, -r, "error while reading from old backing file: %s",
                             strerror(-r));
        r = read_new(x, at, n);
        if (r < 0)
            return error_set(err, -r, "error while reading from new backing file: %s",
                             strerror(-r));
        r = write_differences(x, at, n);
        if (r < 0)
            return error_set(err, -r, "Error while writing to COW image: %s", strerror(-r));
        at += n;
        x->bar.done += n;
        if (cli_interrupted())
            return cli_interrupted_error(err);
    }
    return 0;
}

/* What is compressed is whole clusters. Where one is left in part, the image has nothing of the rest either. */
static void fit_to_clusters(struct extent *e, uint64_t unit, uint64_t size, bool *leave)
{
    uint64_t end = e->offset + e->len;

    if (end == size)
        return;
    if (*leave && align_down(end, unit) > e->offset) {
        e->len = align_down(end, unit) - e->offset;
    } else {
        *leave = *leave && is_aligned(end, unit);
        e->len = MIN(align_up(end, unit), size) - e->offset;
    }
}

static int co_fn keep_content(struct rebase *x, struct error **err)
{
    struct extent_walk ours = {.backend = x->top.backend};
    struct extent_walk theirs = {.backend = x->below.backend};
    uint64_t unit = qcow2_header_cluster_size(&x->top.layers[0].header);
    uint64_t size = backend_size(x->top.backend);

    for (uint64_t at = 0; at < size;) {
        struct extent e;
        struct extent n = {.len = size - at, .flags = EXTENT_ZERO};
        bool leave;
        int r = extent_walk_at(&ours, at, size - at, &e);

        if (r == 0 && theirs.backend)
            r = extent_walk_at(&theirs, at, e.len, &n);
        if (r < 0)
            return error_set(err, -r, "error while reading image metadata: %s", strerror(-r));
        e.len = MIN(e.len, n.len);
        leave = (e.flags & EXTENT_ALLOCATED) || (e.flags & n.flags & EXTENT_ZERO);
        if (x->compress)
            fit_to_clusters(&e, unit, size, &leave);
        if (leave) {
            x->bar.done += e.len;
        } else {
            r = keep_range(x, at, e.len, err);
            if (r < 0)
                return r;
        }
        at += e.len;
    }
    return 0;
}

static int co_fn control_fn open_below(struct graph *g, struct rebase *x, struct error **err)
{
    AUTO(free_ptr) char *path = NULL;
    struct image_spec spec = {.format = x->format, .flags = x->source_cache.flags & IMAGE_DIRECT};

    if (!*x->backing)
        return 0;
    path = image_combine(x->top.layers[0].path, x->backing);
    spec.name = path;
    return image_co_open(&x->below, g, "n", &spec, err);
}

static int co_fn control_fn make_independent(struct graph *g, struct rebase *x, struct error **err)
{
    int r = open_below(g, x, err);

    x->old_data = iobuf_new(CHUNK);
    x->new_data = iobuf_new(CHUNK);
    if (r == 0 && (!x->old_data || !x->new_data))
        r = error_set(err, ENOMEM, "no memory");
    if (r == 0) {
        tool_progress_begin(&x->bar, x->progress, backend_size(x->top.backend));
        r = keep_content(x, err);
        tool_progress_end(&x->bar, r == 0);
    }
    iobuf_unref(x->old_data);
    iobuf_unref(x->new_data);
    image_co_close(&x->below);
    return r;
}

/* ---- the header ---- */

static int co_fn write_header(struct backend *b, struct iobuf *buf, size_t len)
{
    size_t rest = len > QCOW2_HEADER_SECTOR ? len - QCOW2_HEADER_SECTOR : 0;
    int r = image_co_write(b, QCOW2_HEADER_SECTOR, buf->data + QCOW2_HEADER_SECTOR, rest, 0, buf);

    if (r == 0)
        r = image_co_flush(b);
    if (r == 0)
        r = image_co_write(b, 0, buf->data, MIN(len, (size_t)QCOW2_HEADER_SECTOR), 0, buf);
    return r < 0 ? r : image_co_flush(b);
}

/* Of the image as it lies in its file; nobody has it open. */
static int co_fn change_header(struct rebase *x, struct backend *b, struct error **err)
{
    struct iobuf *old = iobuf_new(QCOW2_HEADER_BYTES_MAX);
    struct iobuf *new = iobuf_new(QCOW2_HEADER_BYTES_MAX);
    uint64_t file_size = backend_size(b);
    size_t len = (size_t)MIN(file_size, QCOW2_HEADER_BYTES_MAX);
    struct qcow2_header header = {0};
    int r = old && new ? image_co_read(b, 0, old->data, len, old) : -ENOMEM;

    if (r < 0)
        r = error_set(err, -r, "cannot read the header: %s", strerror(-r));
    else
        r = qcow2_header_parse_tolerant(&header, old->data, len, file_size, x->spec.name, err);
    if (r == 0) {
        len = (size_t)MIN((uint64_t)len, qcow2_header_cluster_size(&header));
        r = qcow2_header_with_backing(&header, old->data, len, *x->backing ? x->backing : NULL,
                                      x->format, new->data, err);
    }
    if (r == 0) {
        r = write_header(b, new, len);
        if (r < 0)
            r = error_set(err, -r, "cannot write the header: %s", strerror(-r));
    }
    qcow2_header_release(&header);
    iobuf_unref(old);
    iobuf_unref(new);
    return r;
}

static int co_fn control_fn rebase(struct graph *g, void *arg, struct error **err)
{
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE, .tolerates = 0};
    struct rebase *x = arg;
    struct backend *b = NULL;
    int r = image_co_open(&x->top, g, "t", &x->spec, err);

    if (r == 0 && (!x->top.layers[0].header.version || strcmp(image_format(&x->top), "qcow2") != 0))
        r = error_set(err, ENOTSUP, "Could not change the backing file: format '%s' has none",
                      image_format(&x->top));
    if (r == 0 && !x->unsafe)
        r = make_independent(g, x, err);
    if (r == 0 && !x->unsafe && image_co_flush(x->top.backend) < 0)
        r = error_set(err, EIO, "cannot flush '%s'", x->spec.name);
    if (r == 0 && !x->unsafe) {
        /* The format lets go of the file, and its nodes with it; the header must be ours alone. */
        struct image_spec spec = x->spec;

        image_co_close(&x->top);
        spec.flags |= IMAGE_HEADERS | IMAGE_NO_BACKING;
        r = image_co_open(&x->top, g, "h", &spec, err);
    }
    if (r == 0)
        r = image_co_backend(&b, g, x->top.layers[0].file_node, access, err);
    if (r == 0)
        r = change_header(x, b, err);
    (void)backend_co_free(b);
    image_co_close(&x->top);
    return r;
}

static int read_option(struct rebase *x, int opt, struct error **err)
{
    switch (opt) {
    case 'b':
        x->backing = optarg;
        return 0;
    case 'F':
        x->format = optarg;
        return 0;
    case 't':
        return tool_read_cache(optarg, &x->cache, err);
    case 'T':
        return tool_read_cache(optarg, &x->source_cache, err);
    case 'u':
        x->unsafe = true;
        return 0;
    case 'p':
        x->progress = true;
        return 0;
    case 'q':
        x->progress = false;
        return 0;
    case 'c':
        x->compress = true;
        return 0;
    case 'U':
        return error_set(err, ENOTSUP,
                         "-U: an image that is rebased cannot be shared with writers");
    default:
        return tool_image_option(&x->spec, opt);
    }
}

static int check(const struct rebase *x, struct error **err)
{
    if (!x->backing)
        return error_set(err, EINVAL,
                         "Could not change the backing file: -b says which; -b '' for none");
    if (*x->backing && !x->format)
        return error_set(err, EINVAL,
                         "Could not change the backing file to '%s': backing format must be "
                         "specified",
                         x->backing);
    if (*x->backing && !image_format_known(x->format))
        return error_set(err, EINVAL, "Invalid format name: '%s'", x->format);
    if (x->compress && x->unsafe)
        return error_set(err, EINVAL, "-c has no effect with -u: nothing is written");
    return 0;
}

static int rebase_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"force-share", no_argument, NULL, 'U'},
        {NULL, 0, NULL, 0},
    };
    struct rebase x = {.spec.flags = IMAGE_WRITE};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:b:F:t:T:upqcU", options, err)) != -1)
        r = read_option(&x, opt, err);
    if (r == 0)
        r = tool_only_image(&x.spec, argc, argv, err);
    if (r == 0)
        r = check(&x, err);
    if (r < 0)
        return r;
    x.spec.flags |= x.cache.flags;
    if (x.unsafe)
        x.spec.flags |= IMAGE_HEADERS | IMAGE_NO_BACKING;
    cli_catch_signals();
    return tool_run(rebase, &x, err);
}

const struct cli_command rebase_command = {
    .name = "rebase",
    .summary = "give an image another backing file",
    .arguments = "[OPTION]... -b BACKING [-F FORMAT] FILE",
    .help =
        "Changes the backing file of a qcow2 image. The disk stays what it is: where it would show something else, the\n"
        "image gets its own copy.\n"
        "\n"
        "  -b BACKING, -F FORMAT  the backing file and its format; -b '' for none\n"
        "  -u                     only name it: whoever says so knows that the content is the same\n"
        "  -c                     compress what the image gets\n"
        "  -f FORMAT              of FILE; by default it is probed\n"
        "  -t CACHE, -T CACHE     of FILE, of BACKING (writeback): none, writeback, writethrough, directsync, unsafe\n"
        "  -p, -q                 show progress; do not\n"
        "      --image-opts       FILE is options: driver=qcow2,file.filename=PATH\n"
        "      --allow DIR        what images refer to may lie in DIR, too\n"
        "  -h, --help             say this and exit\n",
    .is_image_tool = true,
    .run = rebase_run,
};
