/* SPDX-License-Identifier: Apache-2.0 */
/* Copies that the host does (graph/offload.h): to the target a change like any other, and no trap for changes of the graph. */
#include "change-fixture.h"
#include "graph/offload.h"
#include "graph/tracker.h"

#define LEN   (4 * BLOCK)
#define SLACK (100 * NS_PER_MS)

/* ---- who records ---- */

struct record {
    struct tracker tracker;
    unsigned told;
    uint64_t offset; /* what it was told last */
    uint64_t len;
};

static void record_changed(struct tracker *t, uint64_t offset, uint64_t len)
{
    struct record *r = container_of(t, struct record, tracker);

    r->told++;
    r->offset = offset;
    r->len = len;
}

static void record_resized(struct tracker *t, uint64_t size)
{
    (void)t;
    (void)size;
}

/* While the node has no users. */
static void record(struct world *w, struct record *r, const char *node)
{
    *r = (struct record){.tracker = {.changed = record_changed, .resized = record_resized}};
    node_attach_tracker(graph_find(w->graph, node), &r->tracker);
}

static void end_record(struct world *w, struct record *r, const char *node)
{
    node_detach_tracker(graph_find(w->graph, node), &r->tracker);
}

/* ---- copies ---- */

struct copied {
    struct backend *from;
    struct backend *to;
    uint64_t from_offset;
    uint64_t offset;
    int result;
    bool done;
};

static void copied_main(void *arg)
{
    struct copied *c = arg;

    c->result = backend_co_copy(c->from, c->from_offset, c->to, c->offset, LEN, 0);
    c->done = true;
}

static void start_copy(struct world *w, struct copied *c)
{
    c->done = false;
    check(co_scope_start(&w->scope, copied_main, c) == 0);
}

static void wait_copied(const struct copied *c)
{
    while (!c->done)
        pause_for(NS_PER_MS);
}

static void fill(struct world *w, const char *path, char c)
{
    static char data[DISK_SIZE];

    memset(data, c, sizeof(data));
    sim_disk_write(w->disk, path, 0, data, sizeof(data));
}

/* ---- the cases ---- */

static void bytes_pass_by(struct world *w)
{
    struct sim_fault reads = {.name = PATH_A, .ops = SIM_OP(IO_READ), .kind = SIM_DELAY};
    struct sim_fault writes = {.name = PATH_B, .ops = SIM_OP(IO_WRITE), .kind = SIM_DELAY};
    struct backend *a = client(w, "a", "reader");
    struct backend *b = client(w, "b", "writer");
    struct stats stats;

    fill(w, PATH_A, 'a');
    sim_fault_add(&reads);
    sim_fault_add(&writes);
    check(backend_co_copy(a, 3 * BLOCK, b, 10 * BLOCK, LEN, 0) == 0);
    check(content(w, PATH_B, 10 * BLOCK - 1) == 0 && content(w, PATH_B, 10 * BLOCK + LEN) == 0);
    check(content(w, PATH_B, 10 * BLOCK) == 'a' && content(w, PATH_B, 10 * BLOCK + LEN - 1) == 'a');
    check(!reads.seen && !writes.seen);
    sim_fault_remove(&reads);
    sim_fault_remove(&writes);
    backend_stats(a, &stats);
    check(stats.kind[STATS_READ].operations == 1 && stats.kind[STATS_READ].bytes == LEN);
    backend_stats(b, &stats);
    check(stats.kind[STATS_WRITE].operations == 1 && stats.kind[STATS_WRITE].bytes == LEN);
    check(stats.highest_written == 10 * BLOCK + LEN);
    backend_co_free(a);
    backend_co_free(b);
}

static void test_offload__moves_bytes_past_us(void **state)
{
    (void)state;
    everywhere(bytes_pass_by);
}

/* C2: before and after, and also when it fails. Nobody is told of what does not even begin. */
static void told(struct world *w)
{
    struct sim_fault fault = {
        .name = PATH_B, .ops = SIM_OP(IO_COPY), .kind = SIM_ERROR, .error = EIO, .at = 1};
    struct record source;
    struct record target;
    struct backend *a;
    struct backend *b;

    record(w, &source, "a");
    record(w, &target, "b");
    a = client(w, "a", "reader");
    b = client(w, "b", "writer");
    check(backend_co_copy(a, 0, b, 2 * BLOCK, LEN, 0) == 0);
    check(target.told == 2 && target.offset == 2 * BLOCK && target.len == LEN);
    sim_fault_add(&fault);
    check(backend_co_copy(a, 0, b, 8 * BLOCK, LEN, 0) == -EIO);
    check(target.told == 4 && target.offset == 8 * BLOCK);
    sim_fault_remove(&fault);
    check(backend_co_copy(a, 0, b, DISK_SIZE - BLOCK, LEN, 0) == -EIO);
    check(backend_co_copy(a, DISK_SIZE - BLOCK, b, 0, LEN, 0) == -EIO);
    check(backend_co_copy(a, 0, b, 0, BACKEND_MAX_DATA + 1, 0) == -EINVAL);
    check(target.told == 4 && !source.told);
    backend_co_free(a);
    backend_co_free(b);
    end_record(w, &source, "a");
    end_record(w, &target, "b");
}

static void test_offload__tells_trackers(void **state)
{
    (void)state;
    everywhere(told);
}

/* OFFLOAD-5. A filter without the operation has not said that it may be passed by. */
static void refused(struct world *w)
{
    struct access reads = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct backend *a;
    struct backend *b;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a'}");
    a = client(w, "top", "reader");
    b = client(w, "b", "writer");
    check(backend_co_copy(a, 0, b, 0, LEN, 0) == -EOPNOTSUPP);
    check(backend_co_copy(b, 0, a, 0, LEN, 0) == -EOPNOTSUPP);
    backend_co_free(a);
    must_del(w->graph, "top");
    must_add(w->graph, "{'driver':'null-co','node-name':'nothing','size':1048576}");
    a = client(w, "nothing", "reader");
    check(backend_co_copy(a, 0, b, 0, LEN, 0) == -EOPNOTSUPP);
    check(backend_co_copy(b, 0, a, 0, LEN, 0) == -EOPNOTSUPP);
    backend_co_free(a);
    must_del(w->graph, "nothing");
    must_add(w->graph, "{'driver':'file','node-name':'ro','filename':'" PATH_A
                       "','read-only':true,'locking':'off'}");
    a = must_attach(w->graph, "ro", reads, "reader");
    check(backend_co_copy(b, 0, a, 0, LEN, 0) == -EPERM);
    check(backend_co_copy(a, 0, b, 0, LEN, 0) == 0);
    backend_co_free(a);
    backend_co_free(b);
    must_del(w->graph, "ro");
}

static void test_offload__is_refused_where_somebody_must_see_the_data(void **state)
{
    (void)state;
    everywhere(refused);
}

/*
 * OFFLOAD-3: the gate of one disk is closed for long; the copy waits there, and holds up no change of the other one meanwhile.
 */
static void one_gate_closed(struct world *w, const char *closed, const char *other)
{
    struct watch slow = {.persist_ns = NS_PER_S};
    struct watch quick = {.persist_ns = 0};
    struct copied c = {.from = client(w, "a", "reader"), .to = client(w, "b", "writer")};

    start_watch(w, &slow, closed);
    while (!slow.persisted)
        pause_for(NS_PER_MS);
    start_copy(w, &c);
    pause_for(10 * NS_PER_MS);
    check(!c.done);
    start_watch(w, &quick, other);
    wait_watch(&quick);
    check(quick.result == 0 && !slow.done);
    wait_watch(&slow);
    wait_copied(&c);
    check(slow.result == 0 && c.result == 0);
    backend_co_free(c.from);
    backend_co_free(c.to);
}

static void gates(struct world *w)
{
    one_gate_closed(w, "b", "a");
    one_gate_closed(w, "a", "b");
}

static void test_offload__waits_at_no_gate_inside_another(void **state)
{
    (void)state;
    everywhere(gates);
}

/* Both at once, again and again, while copies go both ways. */
struct both {
    struct change_action action;
    struct world *world;
    bool done;
};

static int both_co_persist(struct change_action *a, struct error **err)
{
    (void)a;
    (void)err;
    return co_sleep_until(loop_clock() + NS_PER_MS);
}

static const struct change_action_ops both_ops = {.co_persist = both_co_persist};

static void change_both(void *arg)
{
    struct both *both = arg;
    struct error *err = NULL;

    for (unsigned i = 0; i < 20; i++) {
        struct change c;

        change_init(&c, both->world->graph, "both");
        check(change_add_root(&c, "a", &err) == 0 && change_add_root(&c, "b", &err) == 0);
        both->action = (struct change_action){.ops = NULL};
        change_add_action(&c, &both->action, &both_ops);
        check(change_co_run(&c, &err) == 0);
        change_end(&c);
        pause_for(prng_below(sim_prng(), 3) * NS_PER_MS);
    }
    both->done = true;
}

struct back_and_forth {
    struct both *both;
    struct backend *from;
    struct backend *to;
};

static void copy_all_the_time(void *arg)
{
    struct back_and_forth *b = arg;

    while (!b->both->done) {
        check(backend_co_copy(b->from, 0, b->to, LEN, LEN, 0) == 0);
        pause_for(prng_below(sim_prng(), 1000) * NS_PER_US);
    }
}

static void both_change(struct world *w)
{
    struct backend *a = client(w, "a", "one");
    struct backend *b = client(w, "b", "other");
    struct both both = {.world = w};
    struct back_and_forth ways[] = {{&both, a, b}, {&both, b, a}, {&both, a, b}};
    struct co_scope scope;

    co_scope_init(&scope);
    check(co_scope_start(&scope, change_both, &both) == 0);
    for (unsigned i = 0; i < ARRAY_SIZE(ways); i++)
        check(co_scope_start(&scope, copy_all_the_time, &ways[i]) == 0);
    co_scope_join(&scope);
    backend_co_free(a);
    backend_co_free(b);
}

static void test_offload__lets_changes_of_both_disks_through(void **state)
{
    (void)state;
    everywhere(both_change);
}

/* ---- left to the host ---- */

/* G7, G9: whichever of the two is cut off. What the host does late is told, and comes over no later write. */
static void cut(struct world *w, bool source)
{
    struct sim_fault fault = {.name = PATH_B, .ops = SIM_OP(IO_COPY), .kind = SIM_HANG, .at = 1};
    struct copied c = {.offset = 5 * BLOCK};
    struct sent s = {.there = false};
    struct copied again;
    struct watch quick = {.persist_ns = 0};
    struct backend *b;
    struct record r;

    fill(w, PATH_A, 'a');
    record(w, &r, "b");
    c.from = client(w, "a", "reader");
    c.to = client(w, "b", "writer");
    sim_fault_add(&fault);
    start_copy(w, &c);
    pause_for(10 * NS_PER_MS);
    check(!c.done);
    if (source)
        backend_co_free(c.from);
    else
        backend_co_free(c.to);
    wait_copied(&c);
    check(c.result == -EIO);
    r.told = 0;
    b = source ? c.to : client(w, "b", "next");
    if (source)
        c.from = client(w, "a", "next");
    /* One that the host would have to wait for begins nothing, and keeps nobody. */
    again = (struct copied){.from = c.from, .to = b, .offset = 5 * BLOCK};
    start_copy(w, &again);
    wait_copied(&again);
    check(again.result == -EOPNOTSUPP);
    send_as(w, &s, b, REQUEST_WRITE, 5 * BLOCK, 'w');
    pause_for(SLACK);
    check(!s.done);
    start_watch(w, &quick, "a");
    wait_watch(&quick);
    check(quick.result == 0);
    release(&fault, PATH_B);
    wait_done(&s);
    pause_for(SLACK);
    check(s.result == 0 && r.told > 0);
    check(content(w, PATH_B, 5 * BLOCK) == 'w' && content(w, PATH_B, 6 * BLOCK - 1) == 'w');
    backend_co_free(c.from);
    backend_co_free(b);
    end_record(w, &r, "b");
    fill(w, PATH_B, 0);
}

static void cut_either(struct world *w)
{
    cut(w, false);
    cut(w, true);
}

static void test_offload__is_left_to_the_host_as_a_write_is(void **state)
{
    (void)state;
    everywhere(cut_either);
}

/* A node that looks for zeroes in what is written must see it. */
static void detecting(struct world *w)
{
    struct backend *a = client(w, "a", "reader");
    struct backend *z;

    must_add(w->graph, "{'driver':'file','node-name':'z','filename':'/d/z.img',"
                       "'detect-zeroes':'on'}");
    z = client(w, "z", "writer");
    check(backend_co_copy(a, 0, z, 0, LEN, 0) == -EOPNOTSUPP);
    check(backend_co_copy(z, 0, a, 0, LEN, 0) == 0);
    backend_co_free(a);
    backend_co_free(z);
    must_del(w->graph, "z");
}

static void detecting_with_a_file(struct world *w)
{
    static char data[DISK_SIZE];

    sim_disk_write(w->disk, "/d/z.img", 0, data, sizeof(data));
    detecting(w);
}

static void test_offload__is_refused_where_zeroes_are_looked_for(void **state)
{
    (void)state;
    everywhere(detecting_with_a_file);
}
