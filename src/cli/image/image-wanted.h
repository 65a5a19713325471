/* SPDX-License-Identifier: Apache-2.0 */
/* What a name, options or JSON say of a layer that is to be opened. For image-open.c. */
#ifndef CAIRN_CLI_IMAGE_WANTED_H
#define CAIRN_CLI_IMAGE_WANTED_H

#include "base/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

/* A layer to be made, of what the command line or the layer above says. */
struct wanted {
    json_t *file;      /* definition of the file's node */
    char *format;      /* NULL: it is probed */
    bool bare;         /* the file's node is the image */
    json_t *options;   /* of the format; may be NULL */
    json_t *backing;   /* a tree, null, or NULL: nothing is said */
    const char *shown; /* NULL: the name of the file */
};

/* The fields that it owns. */
void wanted_release(struct wanted *w);

/*
 * The layer that a tree of options, their text (keyval or JSON), or a name describes; `format` is NULL if nothing says it. A tree
 * without its file is the file, or has `file` in it; it is taken. -EINVAL, -ENOTSUP.
 */
int wanted_from_tree(struct wanted *w, json_t *tree, const char *format, struct error **err);
int wanted_from_text(struct wanted *w, const char *text, const char *format, struct error **err);
int wanted_from_name(struct wanted *w, const char *name, const char *format, struct error **err);

/* Says what driver the definition of a file has, if it does not, by what is there. */
int wanted_complete_file(json_t *file, struct error **err);
/* What the filters in a file's definition stand on. */
const json_t *wanted_bottom(const json_t *file);

/* Of what stands before the first ':' of a name, if that makes it a protocol; 0 if nothing does. */
size_t wanted_protocol_len(const char *name);
bool wanted_has_protocol(const char *name, const char *protocol);

#endif
