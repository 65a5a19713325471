/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is to be done when the host ends at last what requests have left to it (G9): files are unlocked (access.c), trackers are told
 * (unended.c). As long as there is any of that, a coroutine on the control thread looks every now and then.
 */
#ifndef CAIRN_GRAPH_LATE_H
#define CAIRN_GRAPH_LATE_H

#include "base/context.h"

#include <stdbool.h>

struct graph;
struct pass;

/* There is something to look for. */
void control_fn late_watch(struct graph *g);
/* The same from any loop, for the request of this pass. */
void late_wake(struct graph *g, const struct pass *pass);
/* Waits until nothing of late_wake() is under way. Nobody calls it any more, and nobody watches. */
void co_fn control_fn late_co_end(struct graph *g);

#endif
