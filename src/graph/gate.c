/* SPDX-License-Identifier: Apache-2.0 */
/* The gate; its design is in the header. */
#include "graph/gate.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "graph/node-internal.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

/* A loop that does not answer for this long is named. */
#define SILENT_NS (100 * NS_PER_MS)

enum gate_want { GATE_OPEN, GATE_CLOSED, GATE_ENDING };

/* What the generation is multiplied with. */
#define GATE_WANTS 4

struct gate_waiter {
    struct list link;
    struct co_wait wait;
    struct gate_slot *slot;
    struct pass *pass;
};

void gate_init(struct gate *gate)
{
    *gate = (struct gate){.control = loop_self()};
}

/* For queries: nothing depends on when others see it. */
static void show(struct gate_slot *slot)
{
    const struct pass *oldest = list_first(&slot->inside, struct pass, link);

    atomic_set_relaxed(&slot->shown_count, slot->count);
    atomic_set_relaxed(&slot->shown_queued, slot->queued);
    atomic_set_relaxed(&slot->shown_oldest_ns, oldest ? oldest->arrived_ns : 0);
}

static void count_in(struct gate_slot *slot, struct pass *pass)
{
    pass->slot = slot;
    slot->count++;
    list_append(&slot->inside, &pass->link);
    show(slot);
}

static void drained_arrived(struct loop_message *m);

/* GATE-2: once per generation, when the message is at hand. */
static void report_if_drained(struct gate_slot *slot)
{
    if (!slot->reports || slot->count || !slot->drained_home ||
        slot->drained_generation == slot->seen)
        return;
    slot->drained_home = false;
    slot->drained_generation = slot->seen;
    slot->drained.fn = drained_arrived;
    loop_post(slot->gate->control, &slot->drained);
}

static void drained_returned(struct loop_message *m)
{
    struct gate_slot *slot = container_of(m, struct gate_slot, drained);

    slot->drained_home = true;
    report_if_drained(slot);
}

static void request_returned(struct loop_message *m);

/* G7: their waits end; the cut edge turns what comes of it into -EIO. */
static void interrupt_cut(struct gate_slot *slot)
{
    struct pass *pass;

    list_for_each (&slot->inside, pass, link) {
        for (const struct pass_frame *f = pass->top; f; f = f->older) {
            if (edge_is_cut(f->edge)) {
                co_interrupt(pass->co);
                break;
            }
        }
    }
}

/* On the slot's loop: does what is wanted now. */
static void obey(struct gate_slot *slot)
{
    uint64_t wanted = atomic_get(&slot->gate->wanted);
    struct parked *parked;
    struct parked *next;
    struct gate_waiter *w;

    if (wanted == slot->seen)
        return;
    slot->seen = wanted;
    slot->closed = wanted % GATE_WANTS == GATE_CLOSED;
    slot->reports = wanted % GATE_WANTS != GATE_OPEN;
    list_for_each_safe (&slot->parked, parked, next, link) {
        if (slot->closed && parked->wait.cancel(&parked->wait))
            co_wait_end(&parked->wait, -ERESTART); /* G6 */
    }
    while (!slot->closed && (w = list_first(&slot->queue, struct gate_waiter, link))) {
        list_remove(&w->link);
        slot->queued--;
        count_in(slot, w->pass); /* GATE-3 */
        co_wait_end(&w->wait, 0);
    }
    show(slot);
    interrupt_cut(slot);
    report_if_drained(slot);
}

static void describe_oldest(struct gate_slot *slot)
{
    const struct pass *pass = list_first(&slot->inside, struct pass, link);

    slot->oldest.arrived_ns = 0;
    if (pass)
        gate_describe(pass, &slot->oldest);
}

static void request_arrived(struct loop_message *m)
{
    struct gate_slot *slot = container_of(m, struct gate_slot, request);

    obey(slot);
    describe_oldest(slot);
    if (slot->view_wanted)
        gate_fill_view(slot);
    slot->answered = slot->seen;
    m->fn = request_returned;
    loop_post(slot->gate->control, m);
}

/* On the control thread: sends what is wanted, unless the message is out; then it is sent when it comes back. */
static void send_request(struct gate_slot *slot)
{
    if (!slot->request_home)
        return;
    slot->request_home = false;
    slot->request.fn = request_arrived;
    loop_post(slot->loop, &slot->request);
}

static void request_returned(struct loop_message *m)
{
    struct gate_slot *slot = container_of(m, struct gate_slot, request);
    struct gate *gate = slot->gate;

    slot->request_home = true;
    slot->view_wanted = false;
    if (slot->answered != atomic_get(&gate->wanted))
        send_request(slot);
    else if (gate->home_wait && !gate->home_wait->ended)
        co_wait_end(gate->home_wait, 0);
}

static void drained_arrived(struct loop_message *m)
{
    struct gate_slot *slot = container_of(m, struct gate_slot, drained);
    struct gate *gate = slot->gate;

    slot->drained_seen = slot->drained_generation;
    m->fn = drained_returned;
    loop_post(slot->loop, m);
    if (gate->drain_wait && !gate->drain_wait->ended)
        co_wait_end(gate->drain_wait, 0);
}

int gate_attach(struct gate *gate, struct gate_slot **ret)
{
    struct loop *loop = loop_self();
    struct gate_slot *slot = atomic_get(&gate->slots[loop_index(loop)]);

    if (!slot) {
        slot = try_new(struct gate_slot);
        if (!slot)
            return -ENOMEM;
        slot->gate = gate;
        slot->loop = loop;
        list_init(&slot->inside);
        list_init(&slot->queue);
        list_init(&slot->parked);
        slot->request_home = true;
        slot->drained_home = true;
        /*
         * Published first, read second; gate_close() writes first and looks for slots second: one of the two sees the
         * other (GATE-4).
         */
        atomic_set(&gate->slots[loop_index(loop)], slot);
        obey(slot);
    }
    *ret = slot;
    return 0;
}

static bool waiter_cancel(struct co_wait *wait)
{
    struct gate_waiter *w = container_of(wait, struct gate_waiter, wait);

    list_remove(&w->link);
    w->slot->queued--;
    show(w->slot);
    return true;
}

static int co_fn wait_for_opening(struct gate_slot *slot, struct pass *pass)
{
    struct gate_waiter w = {.slot = slot, .pass = pass};
    struct gate_waiter *later;

    co_wait_init(&w.wait, waiter_cancel);
    list_for_each (&slot->queue, later, link) {
        if (later->pass->number > pass->number)
            break; /* one that was inside before goes to the head */
    }
    list_insert_before(&later->link, &w.link);
    slot->queued++;
    show(slot);
    return co_wait(&w.wait, LOOP_FOREVER);
}

int gate_enter(struct gate_slot *slot, struct pass *pass)
{
    pass->arrived_ns = loop_now();
    pass->number = slot->next_number++;
    pass->co = co_self();
    pass->top = NULL;
    pass->left = 0;
    pass->reached_count = 0;
    if (unlikely(slot->closed))
        return wait_for_opening(slot, pass);
    count_in(slot, pass);
    return 0;
}

void gate_leave(struct gate_slot *slot, struct pass *pass)
{
    assert(slot == pass->slot && slot->count && slot->loop == loop_self()); /* GATE-1 */
    list_remove(&pass->link);
    slot->count--;
    show(slot);
    if (unlikely(slot->reports))
        report_if_drained(slot);
}

int gate_step_back(struct gate_slot *slot, struct pass *pass)
{
    gate_leave(slot, pass);
    if (slot->closed)
        return wait_for_opening(slot, pass);
    count_in(slot, pass);
    return 0;
}

static bool parked_cancel(struct co_wait *w)
{
    struct parked *p = container_of(w, struct parked, wait);

    if (p->take_back && !p->take_back(p))
        return false; /* its message is on its way */
    list_remove(&p->link);
    return true;
}

static void parked_arrived(struct loop_message *m)
{
    struct parked *p = container_of(m, struct parked, message);

    list_remove(&p->link);
    co_wait_end(&p->wait, 0);
}

void parked_init(struct parked *p, parked_take_back_fn *take_back)
{
    *p = (struct parked){.take_back = take_back, .loop = loop_self()};
    co_wait_init(&p->wait, parked_cancel);
    list_init(&p->link);
}

void parked_end(struct parked *p)
{
    p->message.fn = parked_arrived;
    loop_post(p->loop, &p->message);
}

int gate_park(struct pass *pass, struct parked *p, uint64_t deadline_ns)
{
    struct gate_slot *slot = pass->slot;
    int r;

    if (slot)
        list_append(&slot->parked, &p->link);
    if ((!slot || slot->closed) && parked_cancel(&p->wait))
        return -ERESTART; /* a change's own request is the drain */
    r = co_wait(&p->wait, deadline_ns);
    return r == -ETIMEDOUT && !co_cancelled() ? 0 : r;
}

int gate_park_until(struct pass *pass, uint64_t deadline_ns)
{
    struct parked p;

    if (!pass->slot)
        return co_sleep_until(deadline_ns); /* a change's own request: it is the drain */
    parked_init(&p, NULL);
    return gate_park(pass, &p, deadline_ns);
}

bool gate_is_closed(const struct gate *gate)
{
    return atomic_get(&gate->wanted) % GATE_WANTS == GATE_CLOSED;
}

/* Sends all slots their message, so that each answers with its oldest request. */
static void ask(struct gate *gate)
{
    gate->asked_ns = loop_clock();
    for (unsigned i = 0; i < LOOP_MAX; i++) {
        struct gate_slot *slot = atomic_get(&gate->slots[i]);

        if (slot)
            send_request(slot);
    }
}

static void want(struct gate *gate, enum gate_want what)
{
    uint64_t wanted = atomic_get(&gate->wanted);

    atomic_set(&gate->wanted, (wanted / GATE_WANTS + 1) * GATE_WANTS + what);
    ask(gate);
}

void gate_close(struct gate *gate)
{
    assert(atomic_get(&gate->wanted) % GATE_WANTS == GATE_OPEN);
    want(gate, GATE_CLOSED);
}

void gate_open(struct gate *gate)
{
    assert(gate_is_closed(gate));
    want(gate, GATE_OPEN);
}

void gate_end(struct gate *gate)
{
    assert(atomic_get(&gate->wanted) % GATE_WANTS == GATE_OPEN);
    want(gate, GATE_ENDING);
}

void gate_cut(struct gate *gate)
{
    want(gate, atomic_get(&gate->wanted) % GATE_WANTS);
}

/* The first slot that is not drained; NULL if all are. */
static struct gate_slot *undrained_slot(struct gate *gate)
{
    uint64_t wanted = atomic_get(&gate->wanted);

    for (unsigned i = 0; i < LOOP_MAX; i++) {
        struct gate_slot *slot = atomic_get(&gate->slots[i]);

        if (slot && slot->drained_seen != wanted)
            return slot;
    }
    return NULL;
}

/* A loop that has had a message for SILENT_NS and not sent it back; NULL if there is none. */
static const struct gate_slot *silent_slot(const struct gate *gate, uint64_t now)
{
    for (unsigned i = 0; i < LOOP_MAX && now - gate->asked_ns >= SILENT_NS; i++) {
        const struct gate_slot *slot = atomic_get(&gate->slots[i]);

        if (slot && !slot->request_home)
            return slot;
    }
    return NULL;
}

/* The oldest request of all loops that have said so; NULL if there is none. */
static const struct gate_oldest *oldest_of_all(const struct gate *gate)
{
    const struct gate_oldest *oldest = NULL;

    for (unsigned i = 0; i < LOOP_MAX; i++) {
        const struct gate_slot *slot = atomic_get(&gate->slots[i]);

        if (slot && slot->request_home && slot->oldest.arrived_ns &&
            (!oldest || slot->oldest.arrived_ns < oldest->arrived_ns))
            oldest = &slot->oldest;
    }
    return oldest;
}

static int drain_failed(const struct gate *gate, const char *owner, struct error **err)
{
    uint64_t now = loop_clock();
    const struct gate_slot *silent = silent_slot(gate, now);
    const struct gate_oldest *oldest = oldest_of_all(gate);
    struct gate_picture picture;

    if (silent)
        return error_set(err, ETIMEDOUT, "%s: thread '%s' has not answered for %" PRIu64 " ms",
                         owner, loop_name(silent->loop), (now - gate->asked_ns) / NS_PER_MS);
    gate_picture(gate, &picture);
    if (!oldest)
        return error_set(err, ETIMEDOUT, "%s: %u requests are still in flight", owner,
                         picture.inside);
    return error_set(err, ETIMEDOUT,
                     "%s: %u requests are still in flight; the oldest, a %s of %" PRIu64
                     " bytes at %" PRIu64 ", is in node '%s' for %" PRIu64 " ms",
                     owner, picture.inside, request_kind_name(oldest->kind), oldest->len,
                     oldest->offset, oldest->node,
                     oldest->arrived_ns < now ? (now - oldest->arrived_ns) / NS_PER_MS : 0);
}

static bool wait_cancel(struct co_wait *w)
{
    (void)w;
    return true;
}

/* Until all slots have drained: 0, -ETIMEDOUT or -ECANCELED. */
static int co_fn control_fn wait_drained(struct gate *gate, uint64_t deadline_ns)
{
    int r = 0;

    while (undrained_slot(gate) && r == 0) {
        struct co_wait w;

        co_wait_init(&w, wait_cancel);
        gate->drain_wait = &w;
        r = co_wait(&w, deadline_ns);
        gate->drain_wait = NULL;
    }
    return undrained_slot(gate) ? r : 0;
}

int gate_co_drained(struct gate *gate, const char *owner, uint64_t deadline_ns, struct error **err)
{
    uint64_t ask_ns = deadline_ns - MIN(deadline_ns, SILENT_NS + SILENT_NS / 10);
    int r;

    assert(atomic_get(&gate->wanted) % GATE_WANTS != GATE_OPEN);
    r = wait_drained(gate, deadline_ns == LOOP_FOREVER ? LOOP_FOREVER : ask_ns);
    if (r == -ETIMEDOUT && !co_cancelled()) {
        ask(gate); /* so that the error knows where it hangs */
        r = wait_drained(gate, deadline_ns);
    }
    if (r == -ETIMEDOUT)
        return drain_failed(gate, owner, err);
    if (r < 0)
        return error_set(err, -r, "%s: waiting for its requests was cancelled", owner);
    return 0;
}

/* Until the slot's `request` message is here. */
static void co_fn co_request_home(struct gate_slot *slot)
{
    struct gate *gate = slot->gate;

    while (!slot->request_home) {
        struct co_wait w;

        co_wait_init(&w, NULL);
        gate->home_wait = &w;
        (void)co_wait(&w, LOOP_FOREVER); /* cannot fail: neither deadline nor cancel */
        gate->home_wait = NULL;
    }
}

void gate_co_release(struct gate *gate)
{
    for (unsigned i = 0; i < LOOP_MAX; i++) {
        struct gate_slot *slot = atomic_get(&gate->slots[i]);

        if (!slot)
            continue;
        /*
         * One more round, which begins here: messages arrive in order, so that when it is back the loop has also had the
         * `drained` message that was sent home before. The round that is under way may have begun before that.
         */
        co_request_home(slot);
        send_request(slot);
        co_request_home(slot);
        assert(!slot->count && !slot->queued);
    }
    for (unsigned i = 0; i < LOOP_MAX; i++) {
        if (gate->slots[i])
            free(gate->slots[i]->view);
        free(gate->slots[i]);
    }
}

bool gate_view_since(struct gate *gate, uint64_t since_ns)
{
    bool all = true;

    for (unsigned i = 0; i < LOOP_MAX; i++) {
        struct gate_slot *slot = atomic_get(&gate->slots[i]);

        if (!slot || (slot->request_home && slot->view && slot->view->taken_ns >= since_ns))
            continue;
        all = false;
        if (slot->request_home) {
            slot->view_wanted = true;
            send_request(slot);
        }
    }
    return all;
}

void gate_picture(const struct gate *gate, struct gate_picture *ret)
{
    *ret = (struct gate_picture){0};
    for (unsigned i = 0; i < LOOP_MAX; i++) {
        const struct gate_slot *slot = atomic_get(&gate->slots[i]);
        uint64_t oldest;

        if (!slot)
            continue;
        ret->inside += atomic_get_relaxed(&slot->shown_count); /* a picture, see the header */
        ret->queued += atomic_get_relaxed(&slot->shown_queued);
        oldest = atomic_get_relaxed(&slot->shown_oldest_ns);
        if (oldest && (!ret->oldest_ns || oldest < ret->oldest_ns))
            ret->oldest_ns = oldest;
    }
}
