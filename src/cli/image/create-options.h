/* SPDX-License-Identifier: Apache-2.0 */
/* New images: what -o may say for each format, and making them where a file or device may be already. */
#ifndef CAIRN_CLI_IMAGE_CREATE_OPTIONS_H
#define CAIRN_CLI_IMAGE_CREATE_OPTIONS_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/encryption.h"
#include "formats/qcow2/qcow2-create.h"
#include "graph/backend.h"
#include "graph/graph.h"

#include <stdbool.h>
#include <stdint.h>

struct image;

enum preallocation { PREALLOC_OFF, PREALLOC_METADATA, PREALLOC_FALLOC, PREALLOC_FULL };

/* All strings belong to it. */
struct create_options {
    const char *format; /* constant: "raw", "qcow2" or "luks" */
    bool has_size;
    uint64_t size;
    char *preallocation_text; /* as given; NULL: not */
    enum preallocation preallocation;
    char *backing_file; /* NULL: none */
    char *backing_format;
    char *compat; /* as given */
    unsigned version;
    uint64_t cluster_size;
    uint64_t refcount_bits;
    bool lazy_refcounts;
    struct encryption encryption;
    enum qcow2_compression compression_type;
    char *data_file; /* NULL: none */
    bool data_file_raw;
    bool extended_l2;
};

/* -EINVAL for a format that cannot be made. */
int create_options_init(struct create_options *o, const char *format, struct error **err);
void create_options_release(struct create_options *o);
/* `key=value,...`, several times. */
int create_options_read(struct create_options *o, const char *text, struct error **err);
/* Is help asked for? Then it is printed. */
bool create_options_help(const char *format, const char *text);
/* What the format can be: -EINVAL. The strings of `o` must outlive `ret`. Only for qcow2. */
int create_options_layout(const struct create_options *o, struct qcow2_layout *ret,
                          struct error **err);
/* How many bytes a LUKS header takes in the image; 0 if it is not encrypted. */
int create_options_luks_len(const struct create_options *o, uint64_t *ret, struct error **err);
/* `Formatting 'x', fmt=qcow2 ...` */
void create_options_print(const struct create_options *o, const char *filename);
int preallocation_read(const char *text, enum preallocation *ret, struct error **err);

/*
 * Makes the image, in place of what is there: a file is emptied first, a device must be large enough. -EAGAIN and the like if
 * somebody uses it. `flags`: IMAGE_DIRECT, IMAGE_NO_FLUSH.
 */
int co_fn control_fn create_co_image(struct graph *g, const char *filename,
                                     const struct create_options *o, unsigned flags,
                                     struct error **err);
/* Allocates [from, to) of a file node, as is said. */
int co_fn control_fn create_co_preallocate(struct backend *b, const char *path, uint64_t from,
                                           uint64_t to, enum preallocation how, struct error **err);
/* Another size for an image that is open for writing. */
int co_fn control_fn image_co_resize(struct image *image, uint64_t size, enum preallocation how,
                                     struct error **err);

#endif
