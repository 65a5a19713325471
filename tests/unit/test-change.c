/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes of the graph case by case (G1-G6, G10, D1): what each rule is there for, on a simulated machine whose disks hang.
 * What is cut off is in test-fence.c.
 */
#include "change-fixture.h"

/* ---- G1, G2 ---- */

/* A filter with a backend of its own at b, over a. Returns that backend. */
static struct backend *add_copier(struct world *w)
{
    struct backend *own;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a','offset':3}");
    own = client(w, "b", "node 'top'");
    backend_set_owner_node(own, graph_find(w->graph, "top"));
    test_filter_of(graph_find(w->graph, "top"))->own = own;
    return own;
}

static void own_backend(struct world *w)
{
    struct sim_fault slow = {
        .name = PATH_A, .ops = SIM_OP(IO_WRITE), .kind = SIM_DELAY, .delay_ns = SOON, .at = 1};
    struct backend *own = add_copier(w);
    struct backend *c = client(w, "top", "client");
    struct sent before = {.there = true};
    struct sent during = {.there = true};
    struct sent root = {.there = true};
    struct watch watch = {.must_be_empty = "top", .persist_ns = 5 * NS_PER_MS};

    sim_fault_add(&slow);
    send_as(w, &before, c, REQUEST_WRITE, 0, 'x');
    pause_for(10 * NS_PER_MS); /* it is at a */
    watch.must_not_be_done = &during;
    start_watch(w, &watch, "b"); /* closes the copier's own gate, and the client's */
    pause_for(10 * NS_PER_MS);
    send_as(w, &during, c, REQUEST_WRITE, BLOCK, 'y');
    send_as(w, &root, own, REQUEST_WRITE, 2 * BLOCK,
            'z'); /* a root request of its own waits, too */
    wait_watch(&watch);
    check(watch.result == 0);
    wait_done(&during);
    wait_done(&root);
    check(before.result == 0 && during.result == 0 && root.result == 0);
    check(root.ended_ns >= watch.committed_ns);
    check(content(w, PATH_B, 0) == 'x' && content(w, PATH_B, BLOCK) == 'y');
    sim_fault_remove(&slow);
    backend_co_free(c);
    test_filter_of(graph_find(w->graph, "top"))->own = backend_co_free(own);
    must_del(w->graph, "top");
}

static void test_change__what_is_done_for_a_request_never_waits_and_drains_with_it(void **state)
{
    (void)state;
    everywhere(own_backend);
}

/* Two changes that meet only above a backend that a node owns. */
static void meet_above(struct world *w)
{
    struct backend *own = add_copier(w);
    struct backend *c = client(w, "top", "client");
    struct watch one = {.persist_ns = 10 * NS_PER_MS};
    struct watch two = {.persist_ns = 10 * NS_PER_MS};

    start_watch(w, &one, "b");
    start_watch(w, &two, "top"); /* would close the client's gate a second time */
    wait_watch(&one);
    wait_watch(&two);
    check(one.result == 0 && two.result == 0);
    check(two.ended_ns >= one.ended_ns + 10 * NS_PER_MS);
    backend_co_free(c);
    test_filter_of(graph_find(w->graph, "top"))->own = backend_co_free(own);
    must_del(w->graph, "top");
}

static void test_change__reserves_what_is_above_an_owned_backend(void **state)
{
    (void)state;
    everywhere(meet_above);
}

/* A filter that is put above a node by whose side it has a backend does not come to feed itself. */
static void own_backend_stays(struct world *w)
{
    struct error *err = NULL;
    struct backend *own;
    struct backend *c = client(w, "a", "client");
    struct sent s = {.there = true};

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a','offset':3}");
    own = client(w, "a", "node 'top'");
    backend_set_owner_node(own, graph_find(w->graph, "top"));
    test_filter_of(graph_find(w->graph, "top"))->own = own;
    check(graph_co_replace(w->graph, "a", "top", &err) == 0);
    check(backend_node(c) == graph_find(w->graph, "top"));
    check(backend_node(own) == graph_find(w->graph, "a"));
    send_as(w, &s, c, REQUEST_WRITE, 0, 'x');
    wait_done(&s);
    check(s.result == 0);
    backend_co_free(c);
    test_filter_of(graph_find(w->graph, "top"))->own = backend_co_free(own);
    must_del(w->graph, "top");
}

static void test_change__replacing_leaves_what_the_new_node_uses(void **state)
{
    (void)state;
    everywhere(own_backend_stays);
}

/* ---- G3 ---- */

enum insider_way { INSIDER_COPIES, INSIDER_FAILS, INSIDER_HANGS };

struct insider {
    struct world *world;
    struct backend *backend;
    struct sent kept_out;
    struct watch watch;
    enum insider_way way;
    int result;
    bool done;
};

static int insider_co_run(struct change *c, void *arg, struct error **err)
{
    struct insider *in = arg;
    struct sent last = {
        .backend = in->backend, .kind = REQUEST_WRITE, .offset = BLOCK, .fill = 'i'};

    (void)c;
    check(!backend_is_closed(in->backend));
    check(co_sleep_until(loop_clock() + 5 * NS_PER_MS) == 0);
    check(!atomic_get(&in->kept_out.done));
    if (in->way == INSIDER_FAILS)
        return error_set(err, EIO, "the copy failed");
    sent_here(&last);
    check(!atomic_get(&in->kept_out.done));
    return last.result < 0 ? error_set(err, -last.result, "the copy was too slow") : 0;
}

static void insider_main(void *arg)
{
    struct insider *in = arg;
    AUTO(error_free) struct error *err = NULL;
    struct change c;

    change_init(&c, in->world->graph, "pivot");
    check(change_add_root(&c, "a", &err) == 0);
    in->watch.must_not_be_done = &in->kept_out;
    change_add_action(&c, &in->watch.action, &watch_ops);
    change_set_insider(&c, in->backend, insider_co_run, in);
    in->result = change_co_run(&c, &err);
    change_end(&c);
    in->done = true;
}

/* The job's backend is at the node that changes, or beside it. */
static void with_insider(struct world *w, enum insider_way way, const char *at)
{
    struct backend *c = client(w, "a", "client");
    struct insider in = {.world = w, .backend = client(w, at, "job 'j'"), .way = way};
    struct sent after = {.there = true};
    struct sim_fault fault;
    uint64_t began = loop_clock();

    if (way == INSIDER_HANGS)
        hang(&fault, strcmp(at, "a") ? PATH_B : PATH_A, SIM_OP(IO_WRITE));
    check(co_scope_start(&w->scope, insider_main, &in) == 0);
    pause_for(2 * NS_PER_MS);
    send_as(w, &in.kept_out, c, REQUEST_READ, 0, 0);
    while (!in.done)
        pause_for(NS_PER_MS);
    check(loop_clock() - began <= DEADLINE + SOON);
    if (way == INSIDER_COPIES)
        check(in.result == 0 && in.watch.committed);
    else
        check(in.result < 0 && !in.watch.persisted);
    if (way == INSIDER_HANGS)
        release(&fault, NULL);
    wait_done(&in.kept_out);
    check(in.kept_out.result == 0);
    send_as(w, &after, in.backend, REQUEST_WRITE, 0, 'n'); /* its gate is open again */
    wait_done(&after);
    check(after.result == 0);
    backend_co_free(c);
    backend_co_free(in.backend);
}

static void insiders(struct world *w)
{
    with_insider(w, INSIDER_COPIES, "a");
    with_insider(w, INSIDER_COPIES, "b");
    with_insider(w, INSIDER_FAILS, "a");
    with_insider(w, INSIDER_HANGS, "b");
}

static void test_change__insider_has_its_last_run_behind_closed_gates(void **state)
{
    (void)state;
    everywhere(insiders);
}

/* ---- G5 ---- */

static void side_by_side(struct world *w)
{
    struct backend *c = client(w, "a", "client");
    struct sent stuck = {.there = true};
    struct watch frozen = {.name = "change of a"};
    struct watch free_one = {.name = "change of b"};
    struct sim_fault fault;

    hang(&fault, PATH_A, SIM_OP(IO_WRITE));
    send_as(w, &stuck, c, REQUEST_WRITE, 0, 'x');
    pause_for(10 * NS_PER_MS);
    start_watch(w, &frozen, "a");
    pause_for(NS_PER_MS);
    start_watch(w, &free_one, "b");
    pause_for(SOON);
    check(free_one.done && free_one.result == 0 && !frozen.done); /* P4 */
    wait_watch(&frozen);
    check(frozen.result == -ETIMEDOUT && !frozen.persisted);
    release(&fault, PATH_A);
    wait_done(&stuck);
    check(stuck.result == 0);
    backend_co_free(c);
    free(frozen.text);
}

static void test_change__frozen_disk_holds_up_no_other(void **state)
{
    (void)state;
    everywhere(side_by_side);
}

/* a and b meet only in the copier above both; `apart` meets nobody. */
static void in_turn(struct world *w)
{
    static const char *const roots[] = {"a", "b", "a", "apart"};
    struct backend *own = add_copier(w);
    unsigned turns = 0;
    struct watch v[4];

    must_add(w->graph, "{'driver':'null-co','node-name':'apart'}");
    for (unsigned i = 0; i < 4; i++) {
        v[i] = (struct watch){.persist_ns = 10 * NS_PER_MS, .turns = &turns};
        start_watch(w, &v[i], roots[i]);
    }
    for (unsigned i = 0; i < 4; i++) {
        wait_watch(&v[i]);
        check(v[i].result == 0);
    }
    check(v[0].turn < v[1].turn && v[1].turn < v[2].turn);
    check(v[3].ended_ns < v[1].ended_ns);
    test_filter_of(graph_find(w->graph, "top"))->own = backend_co_free(own);
    must_del(w->graph, "top");
    must_del(w->graph, "apart");
}

static void test_change__overlapping_ones_come_in_turn(void **state)
{
    (void)state;
    everywhere(in_turn);
}

static void kept_waiting(struct world *w)
{
    struct watch long_one = {.name = "the long one", .persist_ns = DEADLINE - SOON};
    struct watch other_long = {.name = "the next one", .persist_ns = DEADLINE - SOON};
    struct watch late = {.name = "the late one"};

    start_watch(w, &long_one, "a");
    start_watch(w, &other_long, "a");
    start_watch(w, &late, "a");
    wait_watch(&late);
    check(late.result == -EBUSY && late.ended_ns >= DEADLINE);
    must_contain(&late, "the late one");
    must_contain(&late, "the next one");
    wait_watch(&other_long);
    check(long_one.result == 0 && other_long.result == 0);
    free(late.text);
}

static void test_change__refusal_names_the_holder(void **state)
{
    (void)state;
    everywhere(kept_waiting);
}

struct deletion {
    struct world *world;
    const char *node;
};

static void del_main(void *arg)
{
    struct deletion *d = arg;

    must_del(d->world->graph, d->node);
}

static void node_goes(struct world *w)
{
    struct watch first = {.persist_ns = 10 * NS_PER_MS};
    struct watch last = {.persist_ns = 0};
    struct deletion passing = {.world = w, .node = "passing"};

    must_add(w->graph, "{'driver':'null-co','node-name':'passing'}");
    start_watch(w, &first, "passing");
    check(co_scope_start(&w->scope, del_main, &passing) == 0);
    start_watch(w, &last, "passing");
    wait_watch(&last);
    check(first.result == 0 && last.result == -ENOENT);
    must_contain(&last, "there is no node 'passing'");
    free(last.text);
}

static void test_change__node_goes_while_a_change_waits_for_it(void **state)
{
    (void)state;
    everywhere(node_goes);
}

struct call {
    struct world *world;
    struct backend *backend;
    int result;
    bool done;
    const char *from;
    const char *to;
};

static void free_main(void *arg)
{
    struct call *c = arg;

    backend_co_free(c->backend);
    c->done = true;
}

static void replace_main(void *arg)
{
    struct call *c = arg;
    AUTO(error_free) struct error *err = NULL;

    c->result = graph_co_replace(c->world->graph, c->from, c->to, &err);
    c->done = true;
}

static void resize_main(void *arg)
{
    struct call *c = arg;
    AUTO(error_free) struct error *err = NULL;

    c->result = graph_co_resize(c->world->graph, c->from, DISK_SIZE / 2, &err);
    c->done = true;
}

/* A backend that is to go waits for a change that moves it, and takes its old node away. */
static void moved_while_leaving(struct world *w)
{
    struct watch hold = {.persist_ns = 10 * NS_PER_MS};
    struct call move = {.world = w, .from = "b", .to = "a"};
    struct call leave = {.world = w, .backend = client(w, "b", "client")};
    struct deletion old = {.world = w, .node = "b"};

    start_watch(w, &hold, "b");
    check(co_scope_start(&w->scope, replace_main, &move) == 0);
    check(co_scope_start(&w->scope, del_main, &old) == 0);
    check(co_scope_start(&w->scope, free_main, &leave) == 0);
    wait_watch(&hold);
    while (!leave.done)
        pause_for(NS_PER_MS);
    check(move.result == 0);
    must_del(w->graph, "a");
    add_disk(w, "a", PATH_A); /* nobody has it open for writing */
}

static void test_change__backend_is_moved_while_it_waits_to_go(void **state)
{
    (void)state;
    everywhere(moved_while_leaving);
}

/* Resizing waits for a change that puts another disk in the node's place. */
static void resized_while_moved(struct world *w)
{
    struct watch hold = {.persist_ns = 10 * NS_PER_MS};
    struct call move = {.world = w, .from = "a", .to = "b"};
    struct call size = {.world = w, .from = "a"};
    struct backend *c = client(w, "a", "client");

    start_watch(w, &hold, "a");
    check(co_scope_start(&w->scope, replace_main, &move) == 0);
    check(co_scope_start(&w->scope, resize_main, &size) == 0);
    while (!size.done)
        pause_for(NS_PER_MS);
    check(move.result == 0 && size.result == 0);
    check(backend_node(c) == graph_find(w->graph, "b") && backend_size(c) == DISK_SIZE);
    check(sim_disk_size(w->disk, PATH_A) == DISK_SIZE / 2);
    check(sim_disk_size(w->disk, PATH_B) == DISK_SIZE);
    backend_co_free(c);
}

static void test_change__resize_finds_its_node_after_it_has_waited(void **state)
{
    (void)state;
    everywhere(resized_while_moved);
}

static void filters_follow(struct world *w)
{
    struct error *err = NULL;
    struct backend *c;

    must_add(w->graph, "{'driver':'raw','node-name':'f','file':'a'}");
    must_add(w->graph, "{'driver':'raw','node-name':'g','file':'f'}");
    c = client(w, "g", "client");
    check(graph_co_resize(w->graph, "g", DISK_SIZE * 2, &err) == 0);
    check(backend_size(c) == DISK_SIZE * 2 && sim_disk_size(w->disk, PATH_A) == DISK_SIZE * 2);
    check(node_size(graph_find(w->graph, "f")) == DISK_SIZE * 2);
    check(graph_co_resize(w->graph, "a", DISK_SIZE, &err) == 0);
    check(backend_size(c) == DISK_SIZE);
    backend_co_free(c);
    must_del(w->graph, "g");
    must_del(w->graph, "f");
}

static void test_change__filters_follow_the_size(void **state)
{
    (void)state;
    everywhere(filters_follow);
}

/* ---- G6 ---- */

static void parked(struct world *w)
{
    struct sent s = {.there = true};
    struct test_filter *f;
    struct backend *c;
    uint64_t began;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a','offset':1,'size':%llu}",
             3600ull * NS_PER_S);
    f = test_filter_of(graph_find(w->graph, "top"));
    c = client(w, "top", "client");
    send_as(w, &s, c, REQUEST_WRITE, 0, 'p');
    pause_for(10 * NS_PER_MS);
    began = loop_clock();
    for (unsigned i = 0; i < 5; i++) {
        struct watch watch = {.persist_ns = NS_PER_MS};

        start_watch(w, &watch, "a");
        wait_watch(&watch);
        check(watch.result == 0);
        pause_for(10 * NS_PER_MS); /* it parks anew */
    }
    check(loop_clock() - began < 5 * SOON);
    check(atomic_get(&f->restarts) == 5 && atomic_get(&f->tokens) == 0 && !s.done);
    pause_for(3600ull * NS_PER_S);
    wait_done(&s);
    check(s.result == 0 && atomic_get(&f->tokens) == 1);
    check(f->first_park_deadline_ns == f->last_park_deadline_ns);
    check(s.ended_ns < f->first_park_deadline_ns + SOON);
    backend_co_free(c);
    must_del(w->graph, "top");
}

static void test_change__parked_request_waits_no_longer_for_changes(void **state)
{
    (void)state;
    everywhere(parked);
}

/* Who goes waits for those that park; beyond the deadline they are cut (G7). */
static void parked_while_leaving(struct world *w)
{
    struct sent s = {.there = true};
    struct sent t = {.there = true};
    struct backend *c;
    uint64_t began;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a','offset':1,'size':%llu}",
             100ull * NS_PER_MS);
    c = client(w, "top", "client");
    send_as(w, &s, c, REQUEST_WRITE, 0, 'p');
    pause_for(10 * NS_PER_MS);
    began = loop_clock();
    backend_co_free(c);
    check(s.done && s.result == 0);
    check(loop_clock() - began < 3 * SOON);
    must_del(w->graph, "top");
    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a','offset':1,'size':%llu}",
             3600ull * NS_PER_S);
    c = client(w, "top", "client");
    send_as(w, &t, c, REQUEST_WRITE, 0, 'q');
    pause_for(10 * NS_PER_MS);
    began = loop_clock();
    backend_co_free(c);
    check(t.done && t.result == -EIO);
    check(loop_clock() - began < DEADLINE + SOON);
    check(content(w, PATH_A, 0) == 'p');
    must_del(w->graph, "top");
}

static void test_change__parked_request_ends_when_its_backend_goes(void **state)
{
    (void)state;
    everywhere(parked_while_leaving);
}

/* ---- G10 ---- */

static void silent(struct world *w)
{
    struct backend *c = client(w, "a", "client");
    struct sent s = {.there = true};
    struct watch watch = {.persist_ns = 0};

    send_as(w, &s, c, REQUEST_READ, 0, 0);
    wait_done(&s);
    sim_stall(loop_thread_loop(w->io), loop_clock() + 2 * DEADLINE);
    start_watch(w, &watch, "a");
    wait_watch(&watch);
    check(watch.result == -ETIMEDOUT);
    must_contain(&watch, "thread 'io7' has not answered");
    free(watch.text);
    backend_co_free(c);
}

static void test_change__silent_loop_is_named(void **state)
{
    (void)state;
    everywhere(silent);
}

/* ---- undoing ---- */

static void cancelled_main(void *arg)
{
    struct world *w = arg;
    AUTO(error_free) struct error *err = NULL;

    check(graph_co_replace(w->graph, "a", "b", &err) == -ECANCELED);
}

/* Whoever asked for it goes away while it drains: what prepare did to locks is taken back all the same. */
static void cancelled(struct world *w)
{
    struct backend *c = client(w, "a", "client");
    struct sent stuck = {.there = true};
    struct sent next = {.there = true};
    struct sim_fault fault;
    struct co_scope asker;

    hang(&fault, PATH_A, SIM_OP(IO_WRITE));
    send_as(w, &stuck, c, REQUEST_WRITE, 0, 'x');
    pause_for(10 * NS_PER_MS);
    co_scope_init(&asker);
    check(co_scope_start(&asker, cancelled_main, w) == 0);
    pause_for(SOON);
    check(!can_write(w, PATH_B)); /* taken in prepare, before the users come... */
    check(!can_write(w, PATH_A)); /* ...and not given up before they have gone */
    co_scope_cancel(&asker);
    co_scope_join(&asker);
    check(can_write(w, PATH_B) && !can_write(w, PATH_A));
    release(&fault, PATH_A);
    wait_done(&stuck);
    send_as(w, &next, c, REQUEST_WRITE, 0, 'y');
    wait_done(&next);
    check(stuck.result == 0 && next.result == 0 && content(w, PATH_A, 0) == 'y');
    backend_co_free(c);
}

static void test_change__cancelled_change_is_undone(void **state)
{
    (void)state;
    everywhere(cancelled);
}
