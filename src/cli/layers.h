/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The layers of a disk: an image and the chain of backing files below it, resolved by the tool (Q6). The daemon is told of each
 * one by name, and follows and probes nothing.
 */
#ifndef CAIRN_CLI_LAYERS_H
#define CAIRN_CLI_LAYERS_H

#include "base/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* More are refused. */
#define LAYERS_MAX 4096

struct layer {
    char *path;         /* the top's as it was given, the others' canonical */
    const char *format; /* a driver's name */
    const char *driver; /* "file" or "host_device" */
    bool probed;        /* nobody has said the format */
    bool encrypted;
    const char *key_secret; /* ID of the secret that opens it, if it is encrypted; borrowed */
};

/* The top first. */
struct layers {
    struct layer *v;
    size_t count;
};

/*
 * What the first bytes of an image say: "raw", "qcow2", or the name of a format that is not served here. Never NULL.
 * `path` is looked at for formats that are known by their names only.
 */
const char *layers_probe(const char *path, const void *bytes, size_t len);

/* Can disks of this format be served? */
bool layers_format_known(const char *format);

/*
 * Follows the chain from `path`. `format` NULL: it is probed. Backing files must be regular files in the directory of the image
 * that names them, or in or below one of `allowed`. -EACCES with the way out; -ELOOP; -ENOTSUP for formats, and -EROFS
 * for a top that is never written, unless `read_only`.
 */
int layers_resolve(struct layers *ret, const char *path, const char *format, bool read_only,
                   const char *const *allowed, size_t allowed_count, struct error **err);
void layers_release(struct layers *l);

/*
 * The first ID is for the topmost layer that is encrypted, the second for the next of them, and so on; the last one is also for those
 * that are left. -EINVAL if some are of no use, or none is there. The IDs must outlive the layers.
 */
int layers_set_keys(struct layers *l, const char *const *ids, size_t count, struct error **err);

/* The node's name of layer i: `top` for the first one, `top-1` and so on below it. */
char *layers_node_name(const char *top, size_t i);
/*
 * What blockdev-add takes for layer i, whose lower layers are nodes already. What is only read may be shared with writers by
 * `force_share`. NULL if a path is not UTF-8.
 */
json_t *layers_definition(const struct layers *l, size_t i, const char *top, bool read_only,
                          bool force_share);

#endif
