/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Images as the image tools open them: by a name, options or `json:`, probed where no format is said, with the chain of backing
 * files below. All in the tool's own process; what another program holds is refused by its locks.
 *
 * What an image refers to is followed as the tool is called: under the name qemu-img as that tool does, else only to regular files
 * in the image's directory or a granted one (Q6).
 */
#ifndef CAIRN_CLI_IMAGE_IMAGE_H
#define CAIRN_CLI_IMAGE_IMAGE_H

#include "base/context.h"
#include "base/error.h"
#include "formats/qcow2/qcow2-header.h"
#include "graph/backend.h"
#include "graph/graph.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Longer chains are refused. */
#define IMAGE_LAYERS_MAX 4096

enum image_flags {
    IMAGE_WRITE = 1 << 0,      /* the top is opened for writing, and its size may change */
    IMAGE_SHARE = 1 << 1,      /* although others write (-U) */
    IMAGE_NO_BACKING = 1 << 2, /* the top alone, as if it had no backing file */
    IMAGE_SEPARATE = 1 << 3,   /* each layer alone, as if none had a backing file; no backend */
    IMAGE_HEADERS = 1 << 4,    /* formats are not opened, only their headers are read; no backend */
    IMAGE_DIRECT = 1 << 5,     /* past the host's page cache */
    IMAGE_NO_FLUSH = 1 << 6,   /* flushes are not done */
    /* The layers above the base alone; IMAGE_WRITE is for the top and the base; no backend. */
    IMAGE_COMMIT = 1 << 7,
    IMAGE_FILE = 1 << 8,  /* the top's file alone: only the format is looked for; no backend */
    IMAGE_NODES = 1 << 9, /* no backend: others will use the top's node */
    IMAGE_NO_DISCARD = 1 << 10, /* discards do nothing, unless the image's options say otherwise */
};

/* How an image is named on the command line. */
struct image_spec {
    const char *name;
    const char *format;     /* NULL: it is probed */
    bool options;           /* `name` is options (--image-opts) */
    const char *key_secret; /* opens the top if it is encrypted; NULL: its options say that */
    const char
        *detect_zeroes; /* when the top is written to: "on", "unmap"; NULL: its options say that */
    const char *snapshot; /* -l: what the top shows; NULL: what it holds now */
    const char *base;     /* of IMAGE_COMMIT; NULL: the layer below the top */
    unsigned flags;
};

struct image_layer {
    char *filename; /* as people are shown it */
    char *path;     /* NULL: it is in no file */
    char *format;
    bool probed;
    char *file_node; /* names of nodes */
    char *node; /* not made with IMAGE_HEADERS; the same as file_node where there is no format */
    uint64_t file_size;
    uint64_t disk_bytes;        /* allocated on the host */
    struct qcow2_header header; /* of a qcow2 image, else zeroes */
    bool imported;              /* of a format that is only read: its node is there in any case */
    uint64_t imported_size;     /* of such a disk */
    uint64_t imported_cluster;  /* the unit of allocation; 0: there is none */
    uint64_t luks_payload;      /* of a LUKS volume: where its disk begins */
    char *backing_filename;     /* in full; NULL: it names none */
    char *backing_format;       /* NULL: it is not said */
    char *data_node; /* of an external data file; NULL: there is none, or it is not open */
    char *data_filename;

    json_t *options; /* of the format */
    json_t *backing; /* what the command line says of it; NULL: nothing */
};

struct image {
    struct graph *graph;
    char *prefix; /* of its nodes' names */
    struct image_layer *layers;
    size_t count;
    unsigned flags;
    const char *base_name;
    const char *key_secret;
    const char *detect_zeroes;
    size_t base;      /* of IMAGE_COMMIT: a layer; 0: it was not found yet, or there is none */
    json_t *snapshot; /* that the top shows, as its driver's option; or NULL */
    struct backend *backend; /* on the top */
};

/* All zeroes is an image that is not open. `prefix`: a letter or two, different for each image of a graph. */
int co_fn control_fn image_co_open(struct image *image, struct graph *g, const char *prefix,
                                   const struct image_spec *spec, struct error **err);
/* Closes the backend and the nodes; also of one that is not open. What could not be closed is closed with the graph. */
void co_fn control_fn image_co_close(struct image *image);

/* In whole sectors, as users of the peer know it. */
uint64_t image_size(const struct image *image);
/* "qcow2", "raw", ... of the top. */
const char *image_format(const struct image *image);

/* Adds a node. Takes the definition; -EINVAL when it is NULL. */
int co_fn control_fn image_co_add_node(struct graph *g, json_t *definition, struct error **err);
/*
 * Adds a temporary layer over the node `below`, which takes all writes and goes with the process. `discard` and `detect_zeroes`
 * are those of all nodes.
 */
int co_fn control_fn image_co_add_overlay(struct graph *g, const char *name, const char *below,
                                          uint64_t size, const char *discard,
                                          const char *detect_zeroes, struct error **err);
/* A backend on a node, attached to this loop. */
int co_fn control_fn image_co_backend(struct backend **ret, struct graph *g, const char *node,
                                      struct access access, struct error **err);

/* Where what an image refers to lies, seen from the image's own name; owned by the caller. */
char *image_combine(const char *base, const char *name);
/* The same for the name of an external data file, which the peer takes as it is. */
char *image_data_path(const char *base, const char *name);
/* The definition of the node of a file or device that is named by its path. */
int image_file_definition(const char *name, json_t **ret, struct error **err);
/* -EINVAL if a node of the graph has the file or block device `path`: locks do not keep it where others may write (-U). */
int control_fn image_refuse_in_use(struct graph *g, const char *path, struct error **err);
/* What can be read. */
bool image_format_known(const char *format);
/* "raw", "qcow2", "luks": what can be made and written, too. */
bool image_format_written(const char *format);
/* The others, which can only be read. */
bool image_format_imported(const char *format);
/* Warns that the format of what is about to be written was guessed. */
void image_warn_probed(const struct image *image);

/* How references in images are followed; set before any is opened. */
void image_follow_all(void);
void image_allow(const char *dir);

/*
 * Reads or writes; `len` is at most BACKEND_MAX_DATA. What lies beyond the end reads as zeroes. `buf` is the pool memory that `data` is
 * in; NULL for other memory.
 */
int co_fn image_co_read(struct backend *b, uint64_t offset, void *data, size_t len,
                        struct iobuf *buf);
int co_fn image_co_write(struct backend *b, uint64_t offset, void *data, size_t len, unsigned flags,
                         struct iobuf *buf);
int co_fn image_co_zero(struct backend *b, uint64_t offset, uint64_t len, unsigned flags);
int co_fn image_co_flush(struct backend *b);

#endif
