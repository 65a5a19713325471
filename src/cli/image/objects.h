/* SPDX-License-Identifier: Apache-2.0 */
/* --object of the image tools: secrets, by which images name their keys. */
#ifndef CAIRN_CLI_IMAGE_OBJECTS_H
#define CAIRN_CLI_IMAGE_OBJECTS_H

#include "base/context.h"
#include "base/error.h"

struct graph;

/* Reads what is said of one; it is made when there is a graph. No message shows what it holds. */
int objects_read(const char *text, struct error **err);
/* Makes all of them, in order. */
int co_fn control_fn objects_co_make(struct graph *g, struct error **err);

#endif
