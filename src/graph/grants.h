/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Grants: what the references in images may open (Q6). An image is hostile input: its backing file is opened only if it is a
 * regular file in the directory of the image itself, not below it, or in a granted directory or below it.
 */
#ifndef CAIRN_GRAPH_GRANTS_H
#define CAIRN_GRAPH_GRANTS_H

#include "base/context.h"
#include "base/error.h"

struct graph;

/* Grants what is in a directory and below it, for all images of the graph. -ENOENT, -ENOTDIR, ... */
int co_fn control_fn graph_co_grant(struct graph *g, const char *dir, struct error **err);

/*
 * Where the reference in an image leads, as a canonical path that is owned by the caller. It is taken as QEMU takes it: relative
 * names begin at the directory of the image's name as it is given here, those with `file:` before them at the working
 * directory. -EACCES if it is not granted, or is no plain file name (`json:` and protocols), or the image has no path (NULL); -EINVAL if it is empty; -ENOENT,
 * -ELOOP, ... if it leads nowhere. Links are followed before anything is compared. Whoever may write to a granted directory
 * may put a link there between this answer and the open: the grant trusts them, and not the image.
 */
int co_fn control_fn grants_co_check(struct graph *g, const char *image_path, const char *reference,
                                     char **ret_path, struct error **err);

#endif
