/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fence (G7), and what holds for operations that nobody waits for any more (G8, G9), on a simulated machine whose disks
 * hang.
 */
#include "change-fixture.h"

struct orphans {
    unsigned count;
    unsigned unended;
};

static void count_orphan(const struct node *node, uint64_t age_ns, unsigned unresolved, void *arg)
{
    struct orphans *o = arg;

    (void)node;
    (void)age_ns;
    o->count++;
    o->unended += unresolved;
}

static struct orphans orphans_of(struct world *w)
{
    struct orphans o = {0};

    graph_for_each_orphan(w->graph, count_orphan, &o);
    return o;
}

/* What a query shows, within its bound (P4). */
static void look_at(struct world *w, const char *node, unsigned in_flight, uint64_t offset,
                    const char *where)
{
    struct node_load load;
    uint64_t began = loop_clock();

    graph_co_look(w->graph);
    check(loop_clock() - began <= 110 * NS_PER_MS);
    node_load(graph_find(w->graph, node), &load);
    check(load.in_flight == in_flight && (load.oldest.arrived_ns > 0) == (in_flight > 0));
    if (!in_flight)
        return;
    check(load.oldest.kind == REQUEST_WRITE && load.oldest.offset == offset);
    check(strcmp(load.oldest.node, where) == 0);
}

/* The node at the top shows where below it its oldest request waits. */
static void seen_from_above(struct world *w)
{
    struct sent s = {.there = true};
    struct sent t = {.there = true};
    struct backend *c;
    struct sim_fault fault;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a'}");
    c = client(w, "top", "client");
    look_at(w, "top", 0, 0, NULL);
    hang(&fault, PATH_A, SIM_OP(IO_WRITE));
    send_as(w, &s, c, REQUEST_WRITE, BLOCK, 'x');
    pause_for(10 * NS_PER_MS);
    send_as(w, &t, c, REQUEST_WRITE, 2 * BLOCK, 'x');
    pause_for(10 * NS_PER_MS);
    look_at(w, "top", 2, BLOCK, "a");
    look_at(w, "a", 2, BLOCK, "a");
    look_at(w, "b", 0, 0, NULL);
    sim_stall(loop_thread_loop(w->io), loop_clock() + 500 * NS_PER_MS);
    look_at(w, "top", 0, 0, NULL); /* it does not say in time */
    pause_for(500 * NS_PER_MS);
    release(&fault, PATH_A);
    wait_done(&s);
    wait_done(&t);
    backend_co_free(c);
    must_del(w->graph, "top");
}

static void test_fence__query_shows_where_the_oldest_request_waits(void **state)
{
    (void)state;
    everywhere(seen_from_above);
}

static void add_main(void *arg)
{
    add_disk(arg, "slow", PATH_B);
}

/* A query comes while a node opens: it has a name, and no file yet. */
static void half_made(struct world *w)
{
    struct sim_fault fault;
    uint64_t bytes;

    hang(&fault, PATH_B, SIM_OP(IO_OPEN));
    check(co_scope_start(&w->scope, add_main, w) == 0);
    pause_for(10 * NS_PER_MS);
    check(!node_filename(graph_find(w->graph, "slow")));
    check(!node_allocated_bytes(graph_find(w->graph, "slow"), &bytes));
    release(&fault, PATH_B);
    pause_for(SOON);
    check(strcmp(node_filename(graph_find(w->graph, "slow")), PATH_B) == 0);
    check(node_allocated_bytes(graph_find(w->graph, "slow"), &bytes));
}

static void test_fence__query_comes_while_a_node_opens(void **state)
{
    (void)state;
    everywhere(half_made);
}

static void frozen(struct world *w)
{
    struct backend *c = client(w, "a", "export 'e0'");
    struct sent stuck = {.there = true};
    struct sent reader = {.there = true};
    struct watch watch = {.name = "snapshot"};
    struct sim_fault fault;
    uint64_t began;

    hang(&fault, PATH_A, SIM_OP(IO_WRITE));
    send_as(w, &stuck, c, REQUEST_WRITE, 2 * BLOCK, 'x');
    pause_for(10 * NS_PER_MS);
    began = loop_clock();
    start_watch(w, &watch, "a");
    pause_for(SOON);
    send_as(w, &reader, c, REQUEST_READ, 0, 0); /* waits at the gate */
    look_at(w, "a", 1, 2 * BLOCK, "a");
    wait_watch(&watch);
    check(watch.result == -ETIMEDOUT && !watch.persisted);
    check(watch.ended_ns - began <= DEADLINE + SOON);
    must_contain(&watch, "snapshot: export 'e0': 1 requests");
    must_contain(&watch, "a write of 4096 bytes at 8192, is in node 'a' for 2");
    wait_done(&reader);
    check(reader.result == 0 && !stuck.done);
    /* There is no way back from this: */
    began = loop_clock();
    backend_co_free(c);
    check(loop_clock() - began <= DEADLINE + SOON);
    check(stuck.done && stuck.result == -EIO);
    check(!can_write(w, PATH_A)); /* G9 */
    began = loop_clock();
    must_del(w->graph, "a");
    check(loop_clock() - began <= SOON);
    check(orphans_of(w).count == 1 && orphans_of(w).unended == 1);
    check(!graph_find(w->graph, "a"));
    check(!can_write(w, PATH_A));                               /* G9 */
    must_add(w->graph, "{'driver':'null-co','node-name':'a'}"); /* the name is free */
    release(&fault, PATH_A);
    pause_for(SOON);
    check(orphans_of(w).count == 0);
    check(can_write(w, PATH_A));
    free(watch.text);
}

static void test_fence__frozen_disk_is_named_then_cut_off(void **state)
{
    (void)state;
    everywhere(frozen);
}

/* A node that stays while the host ends what was left to it is unlocked then. */
static void unlocked_late(struct world *w)
{
    struct backend *c = client(w, "a", "client");
    struct sent stuck = {.there = true};
    struct sim_fault fault;

    hang(&fault, PATH_A, SIM_OP(IO_WRITE));
    send_as(w, &stuck, c, REQUEST_WRITE, 0, 'x');
    pause_for(10 * NS_PER_MS);
    backend_co_free(c);
    check(!can_write(w, PATH_A));
    release(&fault, PATH_A);
    pause_for(SOON);
    check(can_write(w, PATH_A));
}

static void test_fence__file_stays_locked_until_its_writes_have_ended(void **state)
{
    (void)state;
    everywhere(unlocked_late);
}

/* Another client's write does not come under the late one, and does not hold up a change while it waits. */
static void late_write(struct world *w)
{
    struct backend *c = client(w, "a", "client");
    struct backend *d = client(w, "a", "other client");
    struct sent stuck = {.there = true};
    struct sent over = {.there = true};
    struct sent beside = {.there = true};
    struct watch watch = {.persist_ns = 0};
    struct sim_fault fault = {.name = PATH_A, .ops = SIM_OP(IO_WRITE), .kind = SIM_HANG, .at = 1};

    sim_fault_add(&fault);
    send_as(w, &stuck, c, REQUEST_WRITE, 0, 'x');
    pause_for(10 * NS_PER_MS);
    backend_co_free(c);
    check(stuck.result == -EIO);
    send_as(w, &over, d, REQUEST_WRITE, 0, 'y');
    send_as(w, &beside, d, REQUEST_WRITE, BLOCK, 'z');
    pause_for(SOON);
    check(!over.done && beside.done && beside.result == 0);
    start_watch(w, &watch, "b"); /* has nothing to do with it */
    wait_watch(&watch);
    check(watch.result == 0);
    {
        struct watch here = {.persist_ns = 0};

        start_watch(w, &here, "a");
        wait_watch(&here);
        check(here.result == 0); /* parked, not in flight */
    }
    release(&fault, PATH_A);
    wait_done(&over);
    check(over.result == 0 && content(w, PATH_A, 0) == 'y');
    pause_for(SOON);
    check(content(w, PATH_A, 0) == 'y');
    backend_co_free(d);
}

static void test_fence__nothing_is_written_under_a_late_write(void **state)
{
    (void)state;
    everywhere(late_write);
}

struct reuse {
    struct world *world;
    struct sent sent;
    struct iobuf *old;
};

/* A read that was cut comes late: not into memory that somebody else has by then. */
static void reuse_there(void *arg)
{
    struct reuse *u = arg;
    struct iobuf *mine[16];

    (void)u;
    for (unsigned i = 0; i < ARRAY_SIZE(mine); i++) {
        mine[i] = iobuf_new(BLOCK);
        memset(mine[i]->data, 'm', BLOCK);
    }
    check(sim_unhang(PATH_A) > 0);
    check(co_sleep_until(loop_clock() + SOON) == 0);
    for (unsigned i = 0; i < ARRAY_SIZE(mine); i++) {
        for (uint64_t k = 0; k < BLOCK; k++)
            check(mine[i]->data[k] == 'm');
        iobuf_unref(mine[i]);
    }
}

static void late_read(struct world *w)
{
    struct backend *c = client(w, "a", "client");
    struct reuse u = {.world = w, .sent = {.there = true}};
    struct sim_fault fault;

    hang(&fault, PATH_A, SIM_OP(IO_READ));
    send_as(w, &u.sent, c, REQUEST_READ, 0, 0);
    pause_for(10 * NS_PER_MS);
    backend_co_free(c);
    check(u.sent.done && u.sent.result == -EIO);
    sim_fault_remove(&fault);
    check(loop_co_call(loop_thread_loop(w->io), reuse_there, &u) == 0);
}

static void test_fence__late_read_finds_its_own_buffer(void **state)
{
    (void)state;
    everywhere(late_read);
}
