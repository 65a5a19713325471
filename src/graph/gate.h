/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gate: where requests enter the graph, and where a change of the graph keeps them out for a moment.
 *
 * GATE-1 Each loop has a slot of its own: a count of requests inside and a closed flag that only this loop touches (G10).
 *        A request is counted off on the loop where it was counted in.
 * GATE-2 The control thread says what it wants of a slot (open or closed, with a generation that grows) and sends the slot's
 *        `request` message; the loop reads what is wanted and sends the message back at once, so that a silent loop is
 *        noticed. When a closed slot's count is zero, the loop sends its `drained` message with the generation.
 *        With its answer it says which request is its oldest, and where that is.
 * GATE-3 While a slot is closed, requests queue, FIFO. Opening counts them in, in their order, before it wakes them.
 * GATE-4 A slot that is made while its gate is closed is born closed (G4).
 * GATE-5 A gate that ends, since nobody sends any more, lets in what still queues; it drains without sending anybody back.
 */
#ifndef CAIRN_GRAPH_GATE_H
#define CAIRN_GRAPH_GATE_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "graph/node.h"
#include "graph/request.h"
#include "loop/co.h"
#include "loop/loop.h"

struct gate;

/* How many nodes a pass remembers the first arrival at (G6). */
#define PASS_REACHED 4

/*
 * An edge that a request has gone down, on the stack of the coroutine that carries it there. The frames of a pass are its path;
 * where a driver sends several requests at once for one, they branch, and end in any order.
 */
struct pass_frame {
    const struct edge *edge;
    struct pass_frame *up;    /* towards the backend */
    struct pass_frame *older; /* all frames of the pass, the youngest in pass->top */
    struct pass_frame *newer;
};

/*
 * A request's pass (G1): it is inside from gate_enter() to gate_leave(). On the stack of the root request's coroutine, which
 * alone touches it, but for queries on the same loop.
 */
struct pass {
    struct gate_slot *slot;
    struct list link; /* in slot->inside, oldest first */
    struct co *co;
    uint64_t number; /* order of arrival at this slot */
    uint64_t arrived_ns;
    struct pass_frame *top; /* the youngest */
    enum request_kind kind;
    uint64_t offset;
    uint64_t len;
    unsigned left; /* changes that were left to the host (UNENDED-1) */
    unsigned reached_count;

    struct {
        const struct node *node;
        uint64_t ns;
    } reached[PASS_REACHED];
};

/* The oldest request of a loop, as the loop has seen it last. */
struct gate_oldest {
    enum request_kind kind;
    uint64_t offset;
    uint64_t len;
    uint64_t arrived_ns;          /* 0: there is none */
    char node[NODE_NAME_MAX + 1]; /* the deepest that it has come to */
};

/* The requests of one loop that have come to one node, those included that have gone on below it. */
struct gate_view_node {
    char name[NODE_NAME_MAX + 1];
    unsigned in_flight;
    struct gate_oldest oldest;
};

#define GATE_VIEW_NODES 16

struct gate_view {
    uint64_t taken_ns;
    unsigned count;
    struct gate_view_node nodes[GATE_VIEW_NODES];
};

/* What one loop knows of a gate. */
struct gate_slot {
    /* Constant. */
    struct gate *gate;
    struct loop *loop;

    /* Only touched on the slot's loop. */
    struct list inside; /* struct pass */
    struct list queue;  /* struct gate_waiter, by number */
    struct list parked; /* struct parked (G6) */
    uint64_t next_number;
    unsigned count;
    unsigned queued;
    bool closed;
    bool reports;  /* closed or ending: says when it is drained */
    uint64_t seen; /* the last `wanted` */
    bool drained_home;

    /* Written on the slot's loop, read by queries on any: relaxed, since a query is a picture of some recent moment. */
    unsigned shown_count;
    unsigned shown_queued;
    uint64_t shown_oldest_ns; /* when the oldest inside arrived; 0: none */

    /* Only touched on the control thread. */
    bool request_home;
    uint64_t drained_seen; /* the generation that was last drained */

    /* Written by the loop before it sends `request` back; the control thread's while that is home. */
    uint64_t answered;
    struct gate_oldest oldest;
    struct gate_view *view; /* made when a query wants it; freed with the slot */
    bool view_wanted;       /* written by the control thread while it is home */

    uint64_t drained_generation; /* as answered, for `drained` */
    struct loop_message request;
    struct loop_message drained;
};

struct gate {
    uint64_t wanted; /* atomic: generation * 4 + enum gate_want; written on the control thread */
    struct gate_slot *slots[LOOP_MAX]; /* atomic; each is set once by its own loop */
    struct loop *control;

    /* Only touched on the control thread. */
    struct co_wait *drain_wait;
    struct co_wait *home_wait;
    uint64_t asked_ns; /* when all slots were last sent a message */
};

/* On the control thread; the gate is open. */
void gate_init(struct gate *gate);
/* Frees the slots. The gate has ended and is drained, and no loop uses it any more. Yields until all messages are home. */
void co_fn control_fn gate_co_release(struct gate *gate);

/* The running loop's slot, made at the first call. -ENOMEM. Not for the data path: a user attaches before it sends requests. */
int gate_attach(struct gate *gate, struct gate_slot **ret);

/* The running loop's slot; it must be attached. */
static inline struct gate_slot *gate_slot_here(struct gate *gate)
{
    return gate->slots[loop_index(loop_self())];
}

/* Waits at a closed gate; -ECANCELED if the scope is cancelled there. A root request only (G1). */
int co_fn gate_enter(struct gate_slot *slot, struct pass *pass);
void gate_leave(struct gate_slot *slot, struct pass *pass);
/*
 * For a request that came back with -ERESTART: steps back, uncounted, to its old place in the queue, and waits there to be let
 * in again. -ECANCELED as above; then it is outside.
 */
int co_fn gate_step_back(struct gate_slot *slot, struct pass *pass);
/*
 * Waits inside until the deadline, for something else than a child's answer (G6): 0 at the deadline; -ERESTART when the gate
 * closes or is closed: to be handed up untouched; -ECANCELED.
 */
int co_fn gate_park_until(struct pass *pass, uint64_t deadline_ns);
/* The same, also until parked_end(): 0. */
int co_fn gate_park(struct pass *pass, struct parked *p, uint64_t deadline_ns);

/* Closes for roots, at once as far as this thread is concerned. Not nested. */
void control_fn gate_close(struct gate *gate);
/* Ends an open gate (GATE-5): nobody sends any more. Not to be opened again. */
void control_fn gate_end(struct gate *gate);
/*
 * Waits until nobody is inside. -ETIMEDOUT with the oldest request, its age and where it is, or the loop that did not answer for
 * 100 ms; the gate stays as it is.
 */
int co_fn control_fn gate_co_drained(struct gate *gate, const char *owner, uint64_t deadline_ns,
                                     struct error **err);
void control_fn gate_open(struct gate *gate);
/* After an edge below was cut: interrupts every request inside whose path leads over a cut edge (G7). */
void control_fn gate_cut(struct gate *gate);
bool gate_is_closed(const struct gate *gate);

/* A picture for queries: sums over all loops. */
struct gate_picture {
    unsigned inside;
    unsigned queued;
    uint64_t oldest_ns; /* when it arrived; 0: nobody is inside */
};

void gate_picture(const struct gate *gate, struct gate_picture *ret);

/* Have all loops said since then what they have inside? Those that have not are asked, if they can be. */
bool control_fn gate_view_since(struct gate *gate, uint64_t since_ns);
/* On the slot's loop. */
void gate_describe(const struct pass *pass, struct gate_oldest *ret);
void gate_fill_view(struct gate_slot *slot);

#endif
