/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Breakpoints of a `fault` node (graph/event.h), for tests and for `cairn io`. A breakpoint holds the first request that comes to
 * its event, and is used up by that. From any loop.
 *
 * A held request goes on when it is resumed; also when a drain begins, since that must not wait for it (G6), and when it is
 * cancelled.
 */
#ifndef CAIRN_FILTERS_FAULT_H
#define CAIRN_FILTERS_FAULT_H

#include "base/context.h"
#include "graph/driver.h"

#include <stdbool.h>

/* The first `fault` node among a node and what it calls below; NULL if there is none. */
struct node *fault_find(struct node *node);

/* Several may have one tag, or one event. -ENOMEM. */
int fault_break(struct node *node, enum event event, const char *tag);
/* All of the tag; what they hold goes on. -ENOENT if none was left. */
int fault_remove(struct node *node, const char *tag);
/* Lets one request go on that a breakpoint of the tag holds, unless another one holds it, too. -ENOENT. */
int fault_resume(struct node *node, const char *tag);
/* Lets all go on, and removes all breakpoints. */
void fault_resume_all(struct node *node);

/* Is there a breakpoint that has not held a request yet; is there a request that is held? */
bool fault_waits(struct node *node, const char *tag);
bool fault_holds(struct node *node, const char *tag);

/*
 * Whoever wants to be told: on the loop of the request, or of whoever resumes it; nothing is locked, and it does not wait. Set while
 * no request is under way.
 */
struct fault_watcher {
    /* Shall this request be held? */
    bool (*may_hold)(void *arg, const struct request *by);
    void (*held)(void *arg, const char *tag); /* it is about to be */
    void (*resumed)(void *arg, const char *tag);
    void *arg;
};

void fault_watch(struct node *node, const struct fault_watcher *watcher);

extern const struct driver fault_driver;

#endif
