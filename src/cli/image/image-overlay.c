/* SPDX-License-Identifier: Apache-2.0 */
/* A temporary layer: writes go there, and the image below stays as it is. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/image/image.h"
#include "formats/qcow2/qcow2-create.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/*
 * The file loses its name as soon as it is open: it goes with the process, however that ends. Flushing what nobody can open again
 * would be of no use.
 */
static int co_fn control_fn make_and_open(struct graph *g, const char *path, const char *name,
                                          const char *below, uint64_t size, const char *discard,
                                          const char *detect_zeroes, struct error **err)
{
    struct qcow2_create_options options = QCOW2_CREATE_OPTIONS_INIT;
    int r;

    options.size = size;
    r = qcow2_co_create(path, &options, err);
    if (r < 0)
        return r;
    r = image_co_add_node(g,
                          json_pack("{s:s, s:s, s:s, s:s, s:s, s:{s:s, s:s, s:{s:b}}}", "driver",
                                    "qcow2", "node-name", name, "backing", below, "discard",
                                    discard, "detect-zeroes", detect_zeroes, "file", "driver",
                                    "file", "filename", path, "cache", "no-flush", 1),
                          err);
    (void)unlink(path); /* at worst a file stays in the directory for temporary ones */
    return r;
}

int image_co_add_overlay(struct graph *g, const char *name, const char *below, uint64_t size,
                         const char *discard, const char *detect_zeroes, struct error **err)
{
    const char *where = getenv("TMPDIR");
    AUTO(free_ptr)
    char *dir = xasprintf("%s/cairn-overlay-XXXXXX", where && *where ? where : "/var/tmp");
    AUTO(free_ptr) char *path = NULL;
    int r;

    if (!mkdtemp(dir))
        return error_set(err, errno, "cannot make the directory '%s': %s", dir, strerror(errno));
    path = xasprintf("%s/overlay.qcow2", dir);
    r = make_and_open(g, path, name, below, size, discard, detect_zeroes, err);
    (void)rmdir(dir); /* as above */
    return r < 0 ? error_wrap(err, r, "temporary layer") : 0;
}
