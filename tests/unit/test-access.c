/* SPDX-License-Identifier: Apache-2.0 */
/* Access between the users of a node (graph/access.h), and drivers that guard theirs against other programs. */
#include "formats/list.h"
#include "graph-fixture.h"
#include "null-co-options.h"
#include "protocols/list.h"
#include "raw-options.h"

#include <errno.h>

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/* ---- between users ---- */

/* A second user against a first one, in all ways. */
static void all_pairs(void *arg)
{
    struct graph *g = graph_new(drivers);

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    for (unsigned first = 0; first < 256; first++) {
        struct access a = {.wants = first & 15, .tolerates = first >> 4};
        struct backend *b = must_attach(g, "n", a, "export 'first'");

        for (unsigned second = 0; second < 256; second++) {
            struct access c = {.wants = second & 15, .tolerates = second >> 4};
            bool clash = (a.wants & ~c.tolerates) || (c.wants & ~a.tolerates);
            struct error *err = NULL;
            struct backend *d;
            int r = backend_co_new(&d, g, "n", c, "job 'second'", &err);

            assert_int_equal(r, clash ? -EPERM : 0);
            if (clash) {
                must_say(err, "export 'first'");
                must_say(err, "job 'second'");
                error_free(&err);
            } else {
                backend_co_free(d);
            }
        }
        backend_co_free(b);
    }
    graph_co_free(g);
}

static void test_access__conflict_is_what_one_wants_and_the_other_refuses(void **state)
{
    (void)state;
    on_engine(LOOP_ENGINE_THREADS, all_pairs, NULL);
}

static void must_conflict(struct graph *g, const char *node, struct access access,
                          const char *owner, const char *text)
{
    struct error *err = NULL;
    struct backend *b;

    assert_int_equal(backend_co_new(&b, g, node, access, owner, &err), -EPERM);
    assert_string_equal(error_text(err), text);
    error_free(&err);
}

/*
 *   export     job
 *     |         |
 *     r         q
 *      \       /
 *       \     /
 *          n
 */
static void through_formats(void *arg)
{
    struct access alone = {.wants = ACCESS_READ | ACCESS_WRITE, .tolerates = ACCESS_READ};
    struct graph *g = graph_new(drivers);
    struct backend *b;
    struct backend *c;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_add(g, "{'driver':'raw','node-name':'r','file':'n'}");
    must_add(g, "{'driver':'raw','node-name':'q','file':'n'}");
    b = must_attach(g, "r", alone, "export 'e'");
    must_conflict(g, "q", ACCESS_RW, "job 'j'",
                  "node 'q' wants write access to node 'n', which node 'r' does not tolerate");
    must_conflict(g, "n", ACCESS_RW, "job 'j'",
                  "job 'j' wants write access to node 'n', which node 'r' does not tolerate");
    must_conflict(g, "n", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_READ},
                  "job 'j'",
                  "node 'r' wants write access to node 'n', which job 'j' does not tolerate");
    c = must_attach(g, "q", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_ALL},
                    "job 'j'");
    backend_co_free(b); /* and with it goes what it refused */
    b = must_attach(g, "n", ACCESS_RW, "export 'e'");
    backend_co_free(b);
    backend_co_free(c);
    graph_co_free(g);
}

static void test_access__goes_down_and_names_those_who_meet(void **state)
{
    (void)state;
    on_both(through_formats, NULL);
}

static void resize_below(void *arg)
{
    struct access resize = {.wants = ACCESS_RESIZE, .tolerates = ACCESS_ALL};
    struct graph *g = graph_new(drivers);
    struct backend *b;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    b = must_attach(g, "n", resize, "block_resize");
    backend_co_free(b);
    must_add(g, "{'driver':'raw','node-name':'r','file':'n'}"); /* without any user */
    must_conflict(g, "n", resize, "block_resize",
                  "block_resize wants resize access to node 'n', which node 'r' does not tolerate");
    b = must_attach(g, "r", resize, "block_resize");
    backend_co_free(b);
    graph_co_free(g);
}

static void test_access__nobody_resizes_below_a_format(void **state)
{
    (void)state;
    on_both(resize_below, NULL);
}

static void read_only(void *arg)
{
    struct graph *g = graph_new(drivers);

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n','read-only':true}");
    must_add(g, "{'driver':'raw','node-name':'r','file':'n'}");
    must_conflict(g, "n", ACCESS_RW, "export 'e'", "node 'n' is read-only");
    must_conflict(g, "r", ACCESS_RW, "export 'e'", "node 'n' is read-only");
    backend_co_free(must_attach(
        g, "r", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_ALL}, "export 'e'"));
    graph_co_free(g);
}

static void test_access__nobody_writes_what_is_read_only(void **state)
{
    (void)state;
    on_both(read_only, NULL);
}

/* ---- drivers that guard, and diamonds ---- */

/* What the guards were told, in order. */
static struct {
    char node[NODE_NAME_MAX + 1];
    struct access access;
} told[64];

static unsigned told_count;
static const char *refuser;

static int guard_co_set_access(struct node *node, struct access access, struct error **err)
{
    assert_true(told_count < ARRAY_SIZE(told));
    strcpy(told[told_count].node, node_name(node));
    told[told_count++].access = access;
    if (refuser && strcmp(refuser, node_name(node)) == 0)
        return error_set(err, EAGAIN, "node '%s' is locked", node_name(node));
    return 0;
}

static int guard_co_open(struct node *node, const void *options, struct error **err)
{
    (void)options;
    (void)err;
    node_set_size(node, 4096);
    return 0;
}

static void guard_co_close(struct node *node)
{
    (void)node;
}

static const struct driver guard_driver = {
    .name = "null-co",
    .kind = DRIVER_PROTOCOL,
    .options = &null_co_options_type,
    .state_size = 1,
    .co_open = guard_co_open,
    .co_close = guard_co_close,
    .co_set_access = guard_co_set_access,
};

/* A format with two edges to its one child: the second is a member of ours over the same option. */
static struct schema_member twin_members[2];
static struct schema_type twin_options;

static const struct driver twin_driver = {
    .name = "raw",
    .kind = DRIVER_FORMAT,
    .options = &twin_options,
    .state_size = 1,
    .co_open = guard_co_open,
    .co_close = guard_co_close,
    .co_set_access = guard_co_set_access,
};

static const struct driver *const guards[] = {&guard_driver, &twin_driver, NULL};
static const struct driver *const *const guard_drivers[] = {guards, NULL};

static void twin_init(void)
{
    twin_options = raw_options_type;
    twin_members[0] = twin_members[1] = raw_options_type.members[0];
    assert_string_equal(twin_members[0].name, "file");
    twin_members[1].name = "twin";
    twin_options.members = twin_members;
    twin_options.count = 2;
}

static void must_tell(unsigned i, const char *node, unsigned wants, unsigned tolerates)
{
    assert_true(i < told_count);
    assert_string_equal(told[i].node, node);
    assert_int_equal(told[i].access.wants, wants);
    assert_int_equal(told[i].access.tolerates, tolerates);
}

/*
 *      top
 *     /   \
 *     \   /
 *     middle (two edges again)
 *     /   \
 *     \   /
 *       n
 */
static void diamond(void *arg)
{
    struct graph *g;
    struct backend *b;
    unsigned n_told = 0;

    (void)arg;
    twin_init();
    refuser = NULL;
    told_count = 0;
    g = graph_new(guard_drivers);
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_add(g, "{'driver':'raw','node-name':'middle','file':'n'}");
    must_add(g, "{'driver':'raw','node-name':'top','file':'middle'}");
    told_count = 0;
    b = must_attach(g, "top", ACCESS_RW, "export 'e'");
    /* All that were told were told what their users want together, in the end. */
    for (unsigned i = 0; i < told_count; i++) {
        n_told += strcmp(told[i].node, "n") == 0;
        must_tell(i, told[i].node, ACCESS_READ | ACCESS_WRITE,
                  strcmp(told[i].node, "top") == 0 ? ACCESS_ALL : ACCESS_ALL - ACCESS_RESIZE);
    }
    assert_true(n_told > 0);
    backend_co_free(b);
    /* One that wants to be the only writer comes twice to the node below: it refuses itself. */
    must_conflict(
        g, "top", (struct access){.wants = ACCESS_WRITE, .tolerates = ACCESS_READ}, "export 'e'",
        "node 'top' wants write access to node 'middle', which node 'top' does not tolerate");
    b = must_attach(g, "n", (struct access){.wants = ACCESS_WRITE, .tolerates = ACCESS_READ},
                    "job 'j'");
    backend_co_free(b);
    graph_co_free(g);
}

static void test_access__diamond_adds_up_both_ways(void **state)
{
    (void)state;
    on_both(diamond, NULL);
}

static void refused_by_driver(void *arg)
{
    struct access reader = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct graph *g;
    struct error *err = NULL;
    struct backend *b;
    struct backend *c;

    (void)arg;
    twin_init();
    twin_options.count = 1;
    refuser = NULL;
    g = graph_new(guard_drivers);
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_add(g, "{'driver':'raw','node-name':'r','file':'n'}");
    b = must_attach(g, "r", reader, "export 'e'");
    told_count = 0;
    refuser = "n";
    assert_int_equal(backend_co_new(&c, g, "r", ACCESS_RW, "job 'j'", &err), -EAGAIN);
    assert_string_equal(error_text(err), "node 'n' is locked");
    error_free(&err);
    must_tell(0, "r", ACCESS_READ | ACCESS_WRITE, ACCESS_ALL);
    must_tell(1, "n", ACCESS_READ | ACCESS_WRITE, ACCESS_ALL - ACCESS_RESIZE);
    must_tell(2, "r", ACCESS_READ, ACCESS_ALL); /* back to what it held */
    assert_int_equal(told_count, 3);            /* nothing new when the refused user goes */
    /* What was refused is not in the books: another user who refuses writers is welcome. */
    refuser = NULL;
    c = must_attach(g, "r", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_READ},
                    "job 'k'");
    backend_co_free(c);
    c = must_attach(g, "r", ACCESS_RW, "job 'j'");
    backend_co_free(c);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_access__all_is_undone_when_a_driver_refuses(void **state)
{
    (void)state;
    on_both(refused_by_driver, NULL);
}
