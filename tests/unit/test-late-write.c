/* SPDX-License-Identifier: Apache-2.0 */
/*
 * P2 and G9 together: a write that its waiter has left to the host changes the disk when all that C2 asks for has been done. Whoever
 * records is told again (UNENDED-1 to UNENDED-4), and what a job or a user clears meanwhile is not clean.
 */
#include "bitmaps/dirty-bitmap.h"
#include "change-fixture.h"
#include "graph/tracker.h"

#define UNIT   ((uint64_t)512)
#define UNITS  (DISK_SIZE / UNIT)
#define BLOCKS (DISK_SIZE / BLOCK)

/* ---- a tracker that knows what it was told ---- */

struct record {
    struct tracker tracker;
    unsigned told; /* atomic */
    bool dirty[UNITS];
};

static void record_changed(struct tracker *t, uint64_t offset, uint64_t len)
{
    struct record *r = container_of(t, struct record, tracker);

    check(len && offset + len <= DISK_SIZE);
    atomic_add(&r->told, 1u);
    for (uint64_t i = offset / UNIT; i * UNIT < offset + len; i++)
        r->dirty[i] = true;
}

static void record_resized(struct tracker *t, uint64_t size)
{
    (void)t;
    (void)size;
}

/* Between changes, as who claims runs does; or behind closed gates. */
static void clear(struct record *r)
{
    memset(r->dirty, 0, sizeof(r->dirty));
    r->told = 0;
}

static void range_must_be_dirty(const struct record *r, uint64_t offset, uint64_t len)
{
    for (uint64_t i = 0; i < UNITS; i++)
        check(r->dirty[i] == (i * UNIT >= offset && i * UNIT < offset + len));
}

/* These blocks are dirty, and no others. */
static void must_be_dirty(const struct record *r, uint64_t first, uint64_t count)
{
    range_must_be_dirty(r, first * BLOCK, count * BLOCK);
}

/* ---- a change in which records are attached and cleared ---- */

struct clearing {
    struct change_action action;
    struct record *records[3]; /* NULL: no more */
    struct node *attach_to;    /* the first one is attached there */
    struct record *look_at;    /* before anything is cleared: these blocks are dirty in it */
    uint64_t first;
    uint64_t count;
};

static int clearing_co_persist(struct change_action *a, struct error **err)
{
    struct clearing *c = container_of(a, struct clearing, action);

    (void)err;
    if (c->look_at)
        must_be_dirty(c->look_at, c->first, c->count);
    return 0;
}

static void clearing_commit(struct change_action *a)
{
    struct clearing *c = container_of(a, struct clearing, action);

    for (unsigned i = 0; i < ARRAY_SIZE(c->records) && c->records[i]; i++)
        clear(c->records[i]);
    if (c->attach_to)
        node_attach_tracker(c->attach_to, &c->records[0]->tracker);
}

static const struct change_action_ops clearing_ops = {
    .co_persist = clearing_co_persist,
    .commit = clearing_commit,
};

static void run_clearing(struct world *w, struct clearing *clearing, const char *root)
{
    struct error *err = NULL;
    struct change c;

    change_init(&c, w->graph, "clearing");
    check(change_add_root(&c, root, &err) == 0);
    change_add_action(&c, &clearing->action, &clearing_ops);
    check(change_co_run(&c, &err) == 0);
    change_end(&c);
}

static void attach(struct world *w, struct record *r, const char *node)
{
    struct clearing c = {.records = {r}, .attach_to = graph_find(w->graph, node)};

    *r = (struct record){.tracker = {.changed = record_changed, .resized = record_resized}};
    run_clearing(w, &c, node);
}

/* No users are left. */
static void detach(struct world *w, struct record *r, const char *node)
{
    node_detach_tracker(graph_find(w->graph, node), &r->tracker);
}

static void clear_in_change(struct world *w, struct record *r, struct record *s)
{
    struct clearing c = {.records = {r, s}};

    run_clearing(w, &c, "a");
}

/* ---- a write that hangs, and whose waiter goes ---- */

struct late {
    struct sim_fault fault;
    struct sent sent;
};

static void leave_write(struct world *w, struct late *l, const char *node, uint64_t block)
{
    struct backend *c = client(w, node, "client");

    l->sent = (struct sent){.there = true};
    l->fault =
        (struct sim_fault){.name = PATH_A, .ops = SIM_OP(IO_WRITE), .kind = SIM_HANG, .at = 1};
    sim_fault_add(&l->fault);
    send_as(w, &l->sent, c, REQUEST_WRITE, block * BLOCK, 'x');
    pause_for(10 * NS_PER_MS);
    backend_co_free(c);
    check(l->sent.done && l->sent.result == -EIO);
}

static void end_write(struct world *w, struct late *l, uint64_t block)
{
    check(content(w, PATH_A, block * BLOCK) == 0);
    release(&l->fault, PATH_A);
    pause_for(SOON);
    check(content(w, PATH_A, block * BLOCK) == 'x');
}

static void told_when_it_ends(struct world *w)
{
    struct record above;
    struct record at;
    struct record beside;
    struct late l;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a'}");
    attach(w, &above, "top");
    attach(w, &at, "a");
    attach(w, &beside, "b");
    leave_write(w, &l, "top", 5);
    must_be_dirty(&above, 5, 1);
    must_be_dirty(&at, 5, 1);
    /* Who claims a run clears it, and reads what is there: not what is still to come. */
    clear(&above);
    clear(&at);
    pause_for(2 * SOON);
    check(!above.told && !at.told);
    end_write(w, &l, 5);
    must_be_dirty(&above, 5, 1);
    must_be_dirty(&at, 5, 1);
    check(!beside.told);
    /* Once. */
    clear(&above);
    clear(&at);
    pause_for(2 * SOON);
    check(!above.told && !at.told);
    clear_in_change(w, &above, &at);
    check(!above.told && !at.told);
    must_del(w->graph, "top");
    detach(w, &at, "a");
    detach(w, &beside, "b");
}

static void test_late_write__is_told_when_it_ends(void **state)
{
    (void)state;
    everywhere(told_when_it_ends);
}

/* The same for one that was cancelled, not cut. */
static void cancelled(struct world *w)
{
    struct sim_fault fault = {.name = PATH_A, .ops = SIM_OP(IO_WRITE), .kind = SIM_HANG, .at = 1};
    struct backend *c = client(w, "a", "job");
    struct sent s = {.backend = c, .kind = REQUEST_WRITE, .offset = 7 * BLOCK, .fill = 'y'};
    struct co_scope scope;
    struct record r;

    attach(w, &r, "a");
    sim_fault_add(&fault);
    co_scope_init(&scope);
    check(co_scope_start(&scope, sent_main, &s) == 0);
    pause_for(10 * NS_PER_MS);
    co_scope_cancel(&scope);
    co_scope_join(&scope);
    check(s.result == -ECANCELED);
    clear(&r);
    release(&fault, PATH_A);
    pause_for(SOON);
    must_be_dirty(&r, 7, 1);
    backend_co_free(c);
    detach(w, &r, "a");
}

static void test_late_write__of_a_cancelled_job_is_told_too(void **state)
{
    (void)state;
    everywhere(cancelled);
}

/* What is cleared behind closed gates, as at a job's start, is set again before they open. */
static void cleared_meanwhile(struct world *w)
{
    struct clearing looks = {.first = 5, .count = 1};
    struct record above;
    struct record at;
    struct record later;
    struct late l;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a'}");
    attach(w, &above, "top");
    attach(w, &at, "a");
    leave_write(w, &l, "top", 5);
    for (unsigned i = 0; i < 3; i++) {
        clear_in_change(w, &above, &at);
        must_be_dirty(&above, 5, 1);
        must_be_dirty(&at, 5, 1);
    }
    attach(w, &later, "top"); /* one that begins to record now */
    must_be_dirty(&later, 5, 1);
    clear(&above);
    looks.look_at = &above;
    run_clearing(w, &looks, "top"); /* who takes the bits then has them */
    end_write(w, &l, 5);
    clear_in_change(w, &above, &at);
    check(!above.told && !at.told);
    must_del(w->graph, "top");
    detach(w, &at, "a");
}

static void test_late_write__is_not_clean_for_who_clears_meanwhile(void **state)
{
    (void)state;
    everywhere(cleared_meanwhile);
}

/* A filter splits the write, and one half hangs: each node knows what it was asked for. */
static void own_ranges(struct world *w)
{
    struct record above;
    struct record at;
    struct late l;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a','offset':%d}", FILTER_SPLIT);
    attach(w, &above, "top");
    leave_write(w, &l, "top", 9);
    attach(w, &at, "a");
    clear_in_change(w, &above, &at);
    must_be_dirty(&above, 9, 1);
    range_must_be_dirty(&at, 9 * BLOCK, BLOCK / 2);
    release(&l.fault, PATH_A);
    pause_for(SOON);
    must_del(w->graph, "top");
    detach(w, &at, "a");
}

static void test_late_write__is_known_to_each_node_in_its_own_terms(void **state)
{
    (void)state;
    everywhere(own_ranges);
}

/* More of them than there is room for: what they cover grows as little as it can. */
static void many(struct world *w)
{
    struct sent sent[24];
    struct backend *c = client(w, "a", "client");
    struct sim_fault fault;
    struct record r;

    attach(w, &r, "a");
    hang(&fault, PATH_A, SIM_OP(IO_WRITE));
    for (unsigned i = 0; i < ARRAY_SIZE(sent); i++) {
        sent[i] = (struct sent){.there = true};
        send_as(w, &sent[i], c, REQUEST_WRITE, (i % 2 ? 200 + i : i) * BLOCK, 'x');
    }
    pause_for(10 * NS_PER_MS);
    backend_co_free(c);
    clear_in_change(w, &r, NULL);
    for (uint64_t i = 0; i < BLOCKS; i++) {
        bool near = i < 24 || (i > 200 && i < 224);
        bool late = near && (i > 200) == i % 2;

        check(!late || r.dirty[i * BLOCK / UNIT]);
        check(near || !r.dirty[i * BLOCK / UNIT]);
    }
    release(&fault, PATH_A);
    pause_for(SOON);
    detach(w, &r, "a");
}

static void test_late_write__ranges_grow_as_little_as_they_can(void **state)
{
    (void)state;
    everywhere(many);
}

/* A node that was not on the way does not know what there is to come. */
static void younger(struct world *w)
{
    struct record r;
    struct late l;

    leave_write(w, &l, "a", 5);
    must_add(w->graph, "{'driver':'raw','node-name':'new','file':'a'}");
    attach(w, &r, "new");
    must_be_dirty(&r, 0, BLOCKS);
    clear(&r);
    end_write(w, &l, 5);
    must_be_dirty(&r, 0, BLOCKS);
    clear_in_change(w, &r, NULL);
    check(!r.told);
    must_del(w->graph, "new");
}

static void test_late_write__may_be_anywhere_in_a_node_that_is_younger(void **state)
{
    (void)state;
    everywhere(younger);
}

/* ---- real bitmaps ---- */

enum step { ADD, CLEAR, FREEZE, ABDICATE };

static void bitmap_step(struct world *w, enum step step)
{
    struct dirty_bitmap_ref ref = {.node = "top", .name = "b0"};
    struct dirty_bitmap_action a;
    struct error *err = NULL;
    struct change c;
    int r = -1;

    change_init(&c, w->graph, "step %d", step);
    switch (step) {
    case ADD:
        r = dirty_bitmap_action_add(&c, &a, ref, BLOCK, true, &err);
        break;
    case CLEAR:
        r = dirty_bitmap_action_clear(&c, &a, ref, &err);
        break;
    case FREEZE:
        r = dirty_bitmap_action_freeze(&c, &a, ref, "job 'j'", &err);
        break;
    case ABDICATE:
        r = dirty_bitmap_action_abdicate(&c, &a, ref, &err);
        break;
    }
    check(r == 0);
    if (change_co_run(&c, &err) < 0)
        fail_msg("%s", error_text(err));
    change_end(&c);
}

static void bitmap_must_be(struct world *w, uint64_t first, uint64_t count)
{
    struct dirty_bitmap_ref ref = {.node = "top", .name = "b0"};
    struct error *err = NULL;
    struct dirty_bitmap *d;
    uint64_t offset;
    uint64_t len;

    check(dirty_bitmap_find(w->graph, ref, &d, &err) == 0);
    check(bitmap_count(dirty_bitmap_bits(d)) == count * BLOCK);
    check(!count || (bitmap_next_dirty(dirty_bitmap_bits(d), 0, DISK_SIZE, &offset, &len) &&
                     offset == first * BLOCK));
}

/* Incremental backups while it hangs: it is in the one that begins, and in the next. */
static void incremental(struct world *w)
{
    struct late l;

    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'a'}");
    bitmap_step(w, ADD);
    bitmap_must_be(w, 0, 0);
    leave_write(w, &l, "top", 5);
    bitmap_step(w, CLEAR);
    bitmap_must_be(w, 5, 1);
    bitmap_step(w, FREEZE);
    bitmap_must_be(w, 5, 1); /* what the job copies */
    bitmap_step(w, ABDICATE);
    bitmap_must_be(w, 5, 1); /* what the next one will */
    end_write(w, &l, 5);
    bitmap_must_be(w, 5, 1);
    bitmap_step(w, CLEAR);
    bitmap_must_be(w, 0, 0);
    must_del(w->graph, "top");
}

static void test_late_write__is_in_each_incremental_backup_until_it_ends(void **state)
{
    (void)state;
    everywhere(incremental);
}
