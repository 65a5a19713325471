/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fault: stops requests at breakpoints.
 *
 * FAULT-1 A request that comes to an event takes all breakpoints of that event with it, and goes on when each of them has been
 *         given back. They are in `breaks` or with one request.
 * FAULT-2 A held request is listed until somebody ends its wait: whoever resumes it, or itself, under the lock.
 * FAULT-3 Nobody is listed whose breakpoints were taken before all were let go: nobody would come for him.
 */
#include "filters/fault/fault.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/list.h"
#include "base/macros.h"
#include "fault-options.h"
#include "graph/gate.h"
#include "graph/graph.h"
#include "loop/lock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct breakpoint {
    struct list link;
    enum event event;
    char tag[];
};

/* A request that waits, on its stack. */
struct held {
    struct parked parked;
    struct fault *fault;
    struct list link;
    struct list breaks; /* struct breakpoint */
    uint64_t let_go;    /* fault.let_go when they were taken */
    bool listed;
};

struct fault {
    struct fault_watcher watcher;
    struct tiny_lock lock;
    /* Protected by lock. */
    struct list breaks; /* struct breakpoint, the newest first */
    struct list held;   /* struct held, the newest first */
    unsigned count;     /* atomic; of `breaks` */
    uint64_t let_go;    /* how often all were */
};

static int co_fn control_fn fault_co_open(struct node *node, const void *options,
                                          struct error **err)
{
    const struct node *child = edge_node(node_file(node));
    struct fault *f = node_state(node);

    (void)options;
    (void)err;
    list_init(&f->breaks);
    list_init(&f->held);
    node_set_size(node, node_size(child));
    node_set_preferred_alignment(node, node_preferred_alignment(child));
    return 0;
}

static void free_breaks(struct list *breaks)
{
    struct breakpoint *b;

    while ((b = list_first(breaks, struct breakpoint, link))) {
        list_remove(&b->link);
        free(b);
    }
}

static void co_fn control_fn fault_co_close(struct node *node)
{
    struct fault *f = node_state(node);

    free_breaks(&f->breaks); /* no request is left */
}

/* ---- holding ---- */

static void tell_held(const struct fault *f, const struct list *breaks)
{
    const struct breakpoint *b;

    if (!f->watcher.held)
        return;
    list_for_each (breaks, b, link)
        f->watcher.held(f->watcher.arg, b->tag);
}

/* Also frees them. */
static void tell_resumed(const struct fault *f, struct list *breaks)
{
    const struct breakpoint *b;

    list_for_each (breaks, b, link) {
        if (f->watcher.resumed)
            f->watcher.resumed(f->watcher.arg, b->tag);
    }
    free_breaks(breaks);
}

/* FAULT-2 */
static bool held_take_back(struct parked *p)
{
    struct held *h = container_of(p, struct held, parked);
    bool listed;

    tiny_lock_acquire(&h->fault->lock);
    listed = h->listed;
    if (listed)
        list_remove(&h->link);
    h->listed = false;
    tiny_lock_release(&h->fault->lock);
    return listed;
}

/* FAULT-1: takes the breakpoints of the event. */
static void take_locked(struct fault *f, struct held *h, enum event event)
{
    struct breakpoint *b;
    struct breakpoint *next;

    h->let_go = f->let_go;
    list_for_each_safe (&f->breaks, b, next, link) {
        if (b->event != event)
            continue;
        list_remove(&b->link);
        list_append(&h->breaks, &b->link);
        atomic_set(&f->count, atomic_get(&f->count) - 1);
    }
}

static void co_fn fault_co_event(struct node *node, enum event event, const struct request *by)
{
    struct fault *f = node_state(node);
    struct held h = {.fault = f};
    bool waits;

    if (likely(!atomic_get(&f->count)) || !by->pass->slot || /* a change's own: it is the drain */
        (f->watcher.may_hold && !f->watcher.may_hold(f->watcher.arg, by)))
        return;
    parked_init(&h.parked, held_take_back);
    list_init(&h.breaks);
    tiny_lock_acquire(&f->lock);
    take_locked(f, &h, event);
    tiny_lock_release(&f->lock);
    if (list_empty(&h.breaks))
        return;
    tell_held(f, &h.breaks);
    tiny_lock_acquire(&f->lock);
    h.listed = h.let_go == f->let_go; /* FAULT-3 */
    if (h.listed)
        list_insert_before(f->held.next, &h.link);
    waits = h.listed;
    tiny_lock_release(&f->lock);
    if (waits)
        (void)co_park(by, &h.parked); /* it goes on, whatever has ended the wait */
    tell_resumed(f, &h.breaks);
}

static int co_fn fault_co_write(struct node *node, struct request *req)
{
    int r;

    fault_co_event(node, EVENT_PWRITEV, req);
    r = edge_co_request(node_file(node), req);
    fault_co_event(node, EVENT_PWRITEV_DONE, req);
    return r;
}

static int co_fn fault_co_write_zeroes(struct node *node, struct request *req)
{
    int r;

    fault_co_event(node, EVENT_PWRITEV_ZERO, req);
    r = edge_co_request(node_file(node), req);
    fault_co_event(node, EVENT_PWRITEV_DONE, req);
    return r;
}

/* ---- breakpoints ---- */

struct node *fault_find(struct node *node)
{
    while (node && node_driver(node) != &fault_driver)
        node = node_file(node) ? edge_node(node_file(node)) : NULL;
    return node;
}

void fault_watch(struct node *node, const struct fault_watcher *watcher)
{
    struct fault *f = node_state(node);

    f->watcher = *watcher;
}

int fault_break(struct node *node, enum event event, const char *tag)
{
    struct fault *f = node_state(node);
    size_t len = strlen(tag) + 1;
    struct breakpoint *b = try_alloc(1, sizeof(*b) + len);

    if (!b)
        return -ENOMEM;
    b->event = event;
    memcpy(b->tag, tag, len);
    tiny_lock_acquire(&f->lock);
    list_insert_before(f->breaks.next, &b->link);
    atomic_set(&f->count, atomic_get(&f->count) + 1);
    tiny_lock_release(&f->lock);
    return 0;
}

static struct breakpoint *find_break(const struct list *breaks, const char *tag)
{
    struct breakpoint *b;

    list_for_each (breaks, b, link) {
        if (strcmp(b->tag, tag) == 0)
            return b;
    }
    return NULL;
}

/* Takes one breakpoint of the tag from whoever is held by it, who goes on if it was the last; NULL: nobody is. */
static struct breakpoint *take_from_held_locked(struct fault *f, const char *tag)
{
    struct held *h;

    list_for_each (&f->held, h, link) {
        struct breakpoint *b = find_break(&h->breaks, tag);

        if (!b)
            continue;
        list_remove(&b->link);
        if (list_empty(&h->breaks)) {
            list_remove(&h->link);
            h->listed = false;
            parked_end(&h->parked); /* the last touch */
        }
        return b;
    }
    return NULL;
}

int fault_resume(struct node *node, const char *tag)
{
    struct fault *f = node_state(node);
    struct breakpoint *b;

    tiny_lock_acquire(&f->lock);
    b = take_from_held_locked(f, tag);
    tiny_lock_release(&f->lock);
    if (!b)
        return -ENOENT;
    if (f->watcher.resumed)
        f->watcher.resumed(f->watcher.arg, b->tag);
    free(b);
    return 0;
}

int fault_remove(struct node *node, const char *tag)
{
    struct fault *f = node_state(node);
    struct breakpoint *b;
    int r = -ENOENT;

    tiny_lock_acquire(&f->lock);
    while ((b = find_break(&f->breaks, tag))) {
        list_remove(&b->link);
        atomic_set(&f->count, atomic_get(&f->count) - 1);
        free(b);
        r = 0;
    }
    tiny_lock_release(&f->lock);
    while (fault_resume(node, tag) == 0)
        ;
    return r;
}

void fault_resume_all(struct node *node)
{
    struct fault *f = node_state(node);
    struct list all;

    list_init(&all);
    tiny_lock_acquire(&f->lock);
    list_splice(&all, &f->breaks);
    atomic_set(&f->count, 0u);
    f->let_go++;
    tiny_lock_release(&f->lock);
    free_breaks(&all);
    for (;;) {
        struct held *h;

        tiny_lock_acquire(&f->lock);
        h = list_first(&f->held, struct held, link);
        if (h) {
            list_remove(&h->link);
            h->listed = false;
            parked_end(&h->parked); /* the last touch; it says itself that it goes on */
        }
        tiny_lock_release(&f->lock);
        if (!h)
            break;
    }
}

bool fault_waits(struct node *node, const char *tag)
{
    struct fault *f = node_state(node);
    bool found;

    tiny_lock_acquire(&f->lock);
    found = find_break(&f->breaks, tag);
    tiny_lock_release(&f->lock);
    return found;
}

bool fault_holds(struct node *node, const char *tag)
{
    struct fault *f = node_state(node);
    const struct held *h;
    bool found = false;

    tiny_lock_acquire(&f->lock);
    list_for_each (&f->held, h, link)
        found |= find_break(&h->breaks, tag) != NULL;
    tiny_lock_release(&f->lock);
    return found;
}

static const char *fault_filename(const struct node *node)
{
    return node_filename(edge_node(node_file(node)));
}

static uint64_t fault_allocated_bytes(const struct node *node)
{
    uint64_t bytes = 0;

    (void)node_allocated_bytes(edge_node(node_file(node)), &bytes);
    return bytes;
}

const struct driver fault_driver = {
    .name = "fault",
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct fault),
    .options = &fault_options_type,
    .co_open = fault_co_open,
    .co_close = fault_co_close,
    .co_event = fault_co_event,
    .co_write = fault_co_write,
    .co_write_zeroes = fault_co_write_zeroes,
    .filename = fault_filename,
    .allocated_bytes = fault_allocated_bytes,
};
