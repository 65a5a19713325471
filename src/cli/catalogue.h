/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The catalogue of a directory of backups. docs/backup.md says what lies in such a directory and why a crash leaves no broken
 * point in it.
 *
 * CAT-1 A point exists when its file ID.json does; that comes last, by a rename, when all that it speaks of is durable.
 * CAT-2 What the files say is not trusted (P6): a point that is not right in itself, whose image is not what it says, or whose
 *       base is no point, is told and left out.
 * CAT-3 Only who holds the directory's lock changes anything in it. Whatever else has a name of ours is half made, and is
 *       removed by who takes the lock.
 */
#ifndef CAIRN_CLI_CATALOGUE_H
#define CAIRN_CLI_CATALOGUE_H

#include "base/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define POINT_ID_MAX           40 /* bytes, the NUL included */
#define POINT_GENERATION_CHARS 32
#define CATALOGUE_ID_CHARS     12

struct point {
    char *id;      /* when it was made: 20261120T234208Z, and -2 and so on for more in one second */
    char *time;    /* of its instant: RFC 3339, UTC, with milliseconds */
    bool full;     /* else it continues `base` */
    char *base;    /* id of a point; NULL if full */
    char *image;   /* name of its file in the directory: ID.qcow2 */
    uint64_t size; /* of the disk, bytes */
    uint64_t bytes;   /* that were copied and are not zeroes */
    char *disk;       /* what the daemon said of the disk's file */
    char *node;       /* and of its node */
    char *bitmap;     /* that records since then */
    char *generation; /* of the bitmap, that began at the point's instant; 32 hexadecimal digits */
    char *reason;     /* why it is full; NULL if it is not */
};

struct catalogue {
    char *dir; /* absolute, without links */
    int dir_fd;
    int lock_fd;                     /* -1: only to be read */
    char id[CATALOGUE_ID_CHARS + 1]; /* random; "" if it has none yet */
    struct point *points;            /* oldest first */
    size_t count;
};

/*
 * A point from the text of its file, which may be anything. `id` is what the file's name says. -EINVAL with what is wrong.
 */
int point_from_text(struct point *ret, const char *id, const char *text, size_t len,
                    struct error **err);
json_t *point_to_json(const struct point *p);
void point_release(struct point *p);
bool point_id_valid(const char *id);

/* To look at. Points that are not right are told by warnings. */
int catalogue_open(struct catalogue **ret, const char *dir, struct error **err);
/*
 * To add to: makes the directory if there is none, takes the lock (-EBUSY: somebody else has it), removes what is half made.
 */
int catalogue_open_locked(struct catalogue **ret, const char *dir, struct error **err);
struct catalogue *catalogue_close(struct catalogue *c);

/* NULL if there is none. Borrowed. */
const struct point *catalogue_find(const struct catalogue *c, const char *id);
/* The one that a bitmap of this name and generation continues; NULL. */
const struct point *catalogue_find_generation(const struct catalogue *c, const char *bitmap,
                                              const char *generation);

/* An id that no file has, for a point made at this time; and the absolute path of its image while it is half made. */
void catalogue_new_id(const struct catalogue *c, uint64_t wall_ns, char ret[POINT_ID_MAX]);
char *catalogue_part_path(const struct catalogue *c, const char *id);
char *catalogue_image_path(const struct catalogue *c, const char *id);

/*
 * The image is whole and flushed by who wrote it: makes it and its name durable, and then the point (CAT-1). Takes over what the
 * point holds. After an error there is no new point, unless only the last sync has failed.
 */
int catalogue_add(struct catalogue *c, struct point *p, struct error **err);
/* How much of the host's space the half made image has, bytes. */
int catalogue_part_allocated(const struct catalogue *c, const char *id, uint64_t *ret,
                             struct error **err);
/* Removes the half made image. */
void catalogue_discard(struct catalogue *c, const char *id);

#endif
