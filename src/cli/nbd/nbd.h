/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cairn nbd: one image, served over NBD by this process, as qemu-nbd does it.
 *
 *   cmd-nbd.c     the command line, under both names
 *   nbd-disk.c    the nodes: the image, and what stands above it
 *   nbd-serve.c   the process: its socket, its end
 */
#ifndef CAIRN_CLI_NBD_H
#define CAIRN_CLI_NBD_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/image.h"
#include "cli/image/tool.h"
#include "loop/loop.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The server has no room for more. */
#define NBD_TOOL_BITMAPS_MAX 63

/* What the command line says. Strings are borrowed. */
struct nbd_tool {
    struct image_spec spec;
    uint64_t offset;
    bool read_only;
    bool overlay; /* writes go to a temporary file */
    const char *discard;
    const char
        *detect_zeroes; /* of the node that holds what is written; NULL: its options say that */
    struct tool_cache cache;
    enum loop_engine engine;

    const char *name;
    const char *description;
    bool depth;
    const char *bitmaps[NBD_TOOL_BITMAPS_MAX];
    size_t bitmap_count;

    const char *path; /* NULL: TCP, or a socket that is inherited */
    const char *bind;
    const char *port;
    int inherited_fd; /* -1: none */
    unsigned shared;  /* clients at a time; 0: no limit */
    bool persistent;  /* stays when the last one has gone */
    bool fork;
    bool verbose;
    const char *pid_file;
};

/* The nodes of an image that is served. All zeroes: there are none. */
struct nbd_disk {
    struct image image;
    bool overlay;
    bool window;
    const char *top; /* name of the node to serve; borrowed */
};

/* nbd-disk.c. After a failure there is nothing to close. */
int co_fn control_fn nbd_disk_co_open(struct nbd_disk *disk, struct graph *g,
                                      const struct nbd_tool *t, struct error **err);
void co_fn control_fn nbd_disk_co_close(struct nbd_disk *disk);

/* nbd-serve.c: returns when it has served. */
int nbd_serve(const struct nbd_tool *t, struct error **err);

/* cmd-nbd.c: is the program called so, and all of the program then. */
bool nbd_is_qemu_nbd(const char *argv0);
int nbd_qemu_nbd(int argc, char **argv);

#endif
