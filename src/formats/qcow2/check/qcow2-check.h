/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checking and repairing qcow2 images. docs/formats/qcow2.md ("Repair") says in which order a repair writes.
 *
 * All features of the format are understood here, also those that the driver does not support. Memory: about two bytes for each
 * cluster that is in use, and 32 bytes for each L2 table; never more than `memory_max`.
 */
#ifndef CAIRN_FORMATS_QCOW2_CHECK_H
#define CAIRN_FORMATS_QCOW2_CHECK_H

#include "base/context.h"
#include "base/error.h"
#include "graph/request.h"

#include <stdbool.h>
#include <stdint.h>

struct backend;

enum qcow2_repair {
    QCOW2_REPAIR_NOTHING,
    QCOW2_REPAIR_LEAKS, /* refcounts that are too high */
    QCOW2_REPAIR_ALL,
};

#define QCOW2_CHECK_MEMORY_MAX ((uint64_t)4 << 30)

struct qcow2_check_options {
    enum qcow2_repair repair;
    uint64_t memory_max;   /* bytes; an image that needs more is not checked */
    uint64_t withheld_max; /* of an image in use: see ADR 0010; bytes; 0: the default */
    void (*say)(void *arg, const char *line); /* what is found and repaired; may be NULL */
    bool (*interrupted)(void *arg); /* ends the check with -EINTR; may be NULL; may wait */
    void (*progress)(void *arg, uint64_t done,
                     uint64_t total); /* bytes of L2 tables; may be NULL */
    void *arg;
};

#define QCOW2_CHECK_OPTIONS_INIT                                                                   \
    {                                                                                              \
        .memory_max = QCOW2_CHECK_MEMORY_MAX                                                       \
    }

struct qcow2_check_result {
    uint64_t image_end_offset; /* bytes; nothing is in use or counted from here on */
    uint64_t total_clusters;   /* of the virtual disk */
    uint64_t allocated_clusters;
    uint64_t fragmented_clusters;
    uint64_t compressed_clusters;
    uint64_t corruptions; /* left, as the next two */
    uint64_t leaks;
    uint64_t check_errors; /* what could not be read */
    uint64_t corruptions_fixed;
    uint64_t leaks_fixed;
    /* Of an image in use: they were freed and given to others meanwhile; of their refcounts nothing is said. */
    uint64_t moved_clusters;
};

/*
 * Checks the image that `file`, a backend of the node below where the format would be, holds; nobody else writes to it. To repair
 * it, the backend must write and resize. What is found is in `ret`; 0, or -EINVAL and the like for what is no image that can be
 * checked, -ENOMEM, -EINTR, or what reading or writing says.
 */
int co_fn qcow2_co_check(struct backend *file, const struct qcow2_check_options *options,
                         struct qcow2_check_result *ret, struct error **err);

/*
 * The same of an image in use, on a backend of its node that reads, attached here: nobody waits for the check but for moments, and
 * what is found is true all the same. Nothing is repaired. -ENOTSUP for another driver, -EBUSY if there is one already, -EAGAIN if what
 * writers did meanwhile ended it, -ETIMEDOUT if writers do not end when it begins.
 */
int co_fn qcow2_co_check_online(struct backend *b, const struct qcow2_check_options *options,
                                struct qcow2_check_result *ret, struct error **err);

/*
 * For an open for writing of an image with the dirty bit (Q5), by the driver, before it reads anything but the header: repairs
 * all, and clears the bit when that is done. The header may be another one afterwards. -EIO if damage is left.
 */
int co_fn qcow2_co_repair_refcounts(struct edge *file, const struct request *by,
                                    const char *node_name, struct error **err);

/*
 * Refcounts get 1 << order bits, by the driver, in version 3, while nobody else is there: a new structure, to which the header points
 * by one write (REPAIR-2). What leaked is free then. -EINVAL for an image with damage, -ERANGE where a cluster is used too often. What
 * the driver knows of refcounts does not hold any more; after an error the header may be the one or the other.
 */
int co_fn qcow2_co_change_refcount_width(struct edge *file, const struct request *by,
                                         const char *node_name, unsigned order, struct error **err);

#endif
