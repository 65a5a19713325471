/* SPDX-License-Identifier: Apache-2.0 */
/*
 * I5: while a node has dirty bitmaps nobody else writes below it, in this process or in another one. What drivers are told is
 * recorded by one of the test's own.
 */
#include "bitmaps/dirty-bitmap.h"
#include "formats/list.h"
#include "graph-fixture.h"
#include "graph/backend.h"
#include "null-co-options.h"

#include <errno.h>

#define OTHERS (ACCESS_ALL & ~(unsigned)(ACCESS_WRITE | ACCESS_RESIZE))

/* ---- the node at the bottom ---- */

static struct {
    struct access told; /* last */
    unsigned count;
    bool refuses;
} lock;

static int disk_co_open(struct node *node, const void *options, struct error **err)
{
    (void)options;
    (void)err;
    node_set_size(node, MIB);
    return 0;
}

static void disk_co_close(struct node *node)
{
    (void)node;
}

static int disk_co_set_access(struct node *node, struct access access, struct error **err)
{
    if (lock.refuses && (access.tolerates & ACCESS_WRITE) == 0)
        return error_set(err, EAGAIN, "node '%s' is locked by others", node_name(node));
    lock.told = access;
    lock.count++;
    return 0;
}

static int disk_co_nothing(struct node *node, struct request *req)
{
    (void)node;
    (void)req;
    return 0;
}

static int disk_co_resize(struct node *node, struct request *req)
{
    node_set_size(node, req->offset);
    return 0;
}

static const struct driver disk_driver = {
    .name = "null-co",
    .kind = DRIVER_PROTOCOL,
    .options = &null_co_options_type,
    .state_size = 1,
    .co_open = disk_co_open,
    .co_close = disk_co_close,
    .co_read = disk_co_nothing,
    .co_write = disk_co_nothing,
    .co_resize = disk_co_resize,
    .co_set_access = disk_co_set_access,
};

static const struct driver *const disks[] = {&disk_driver, NULL};
static const struct driver *const *const drivers[] = {disks, format_drivers, NULL};

/*
 *      d     other
 *       \    /
 *        file
 */
static struct graph *begin(void)
{
    struct graph *g = graph_new(drivers);

    memset(&lock, 0, sizeof(lock));
    lock.told = ACCESS_NONE;
    must_add(g, "{'driver':'null-co','node-name':'file'}");
    must_add(g, "{'driver':'raw','node-name':'d','file':'file'}");
    must_add(g, "{'driver':'raw','node-name':'other','file':'file'}");
    return g;
}

/* ---- changes in a line: "+d/a -d/b", and "!" fails when all else is prepared ---- */

static int fail_persist(struct change_action *a, struct error **err)
{
    (void)a;
    return error_set(err, EIO, "as asked");
}

static const struct change_action_ops failing_ops = {.co_persist = fail_persist};

static int change_bitmaps(struct graph *g, const char *words, struct error **err)
{
    struct dirty_bitmap_action actions[8];
    char text[8][16];
    struct change_action failing = {.node = NULL};
    struct change c;
    int r = 0;

    change_init(&c, g, "change");
    for (unsigned i = 0; r == 0 && *words; words += strcspn(words, " "), words += *words == ' ') {
        struct dirty_bitmap_ref ref;
        char *slash;

        if (*words == '!') {
            change_add_action(&c, &failing, &failing_ops);
            continue;
        }
        assert_true(i < ARRAY_SIZE(actions));
        snprintf(text[i], sizeof(text[i]), "%.*s", (int)strcspn(words, " "), words);
        slash = strchr(text[i], '/');
        *slash = '\0';
        ref = (struct dirty_bitmap_ref){.node = text[i] + 1, .name = slash + 1};
        r = text[i][0] == '+' ? dirty_bitmap_action_add(&c, &actions[i], ref, 0, true, err)
                              : dirty_bitmap_action_remove(&c, &actions[i], ref, err);
        i++;
    }
    if (r == 0)
        r = change_co_run(&c, err);
    change_end(&c);
    return r;
}

static void must_change(struct graph *g, const char *words)
{
    struct error *err = NULL;

    if (change_bitmaps(g, words, &err) < 0)
        fail_msg("%s", error_text(err));
}

static void must_not_change(struct graph *g, const char *words, int errnum, const char *text)
{
    struct error *err = NULL;

    assert_int_equal(change_bitmaps(g, words, &err), -errnum);
    must_say(err, text);
    error_free(&err);
}

static void must_not_attach(struct graph *g, const char *node, struct access access,
                            const char *text)
{
    struct error *err = NULL;
    struct backend *b;

    assert_int_equal(backend_co_new(&b, g, node, access, "export 'e'", &err), -EPERM);
    must_say(err, text);
    error_free(&err);
}

/* Whether the other one may write and resize now. */
static void other_may(struct graph *g, bool may)
{
    struct access resize = {.wants = ACCESS_RESIZE, .tolerates = ACCESS_ALL};

    if (may) {
        backend_co_free(must_attach(g, "other", ACCESS_RW, "export 'e'"));
        return;
    }
    must_not_attach(g, "other", ACCESS_RW,
                    "node 'other' wants write access to node 'file', which node 'd' does not "
                    "tolerate: it has dirty bitmaps");
    must_not_attach(g, "file", ACCESS_RW, "export 'e' wants write access to node 'file'");
    must_not_attach(g, "other", resize, "node 'other' wants resize access to node 'file'");
}

/* ---- in this process ---- */

static void below_body(void *arg)
{
    struct access reader = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct graph *g = begin();
    struct error *err = NULL;
    struct backend *b;
    struct dirty_bitmap *d;
    char byte = 1;

    (void)arg;
    b = must_attach(g, "other", ACCESS_RW, "export 'e'");
    must_not_change(g, "+d/a", EPERM,
                    "node 'other' wants write access to node 'file', which node 'd' does not "
                    "tolerate");
    assert_int_equal(dirty_bitmap_count(graph_find(g, "d")), 0);
    assert_int_equal(write_at(b, 0, 1, &byte), 0);
    backend_co_free(b);
    other_may(g, true);

    must_change(g, "+d/a");
    other_may(g, false);
    backend_co_free(must_attach(g, "other", reader, "export 'r'"));
    /* Who uses the node itself is seen. */
    b = must_attach(g, "d", ACCESS_RW, "export 'e'");
    assert_int_equal(write_at(b, 0, 1, &byte), 0);
    assert_int_equal(dirty_bitmap_find(g, (struct dirty_bitmap_ref){"d", "a"}, &d, &err), 0);
    assert_int_equal(bitmap_count(dirty_bitmap_bits(d)), 64 * KIB);
    other_may(g, false);
    backend_co_free(b);
    other_may(g, false);

    must_change(g, "-d/a");
    other_may(g, true);
    must_change(g, "+d/a");
    must_del(g, "other"); /* a format tolerates no other size anyway */
    assert_int_equal(graph_co_resize(g, "d", 2 * MIB, &err), 0);
    must_not_attach(g, "file", ACCESS_RW, "export 'e' wants write access to node 'file'");
    graph_co_free(g);
}

static void test_bitmap_guard__nobody_else_writes_below(void **state)
{
    (void)state;
    on_both(below_body, NULL);
}

static void counted_body(void *arg)
{
    struct graph *g = begin();

    (void)arg;
    must_change(g, "+d/a +d/b -d/a");
    other_may(g, false);
    must_change(g, "-d/b +d/c");
    other_may(g, false);
    must_change(g, "+d/d +d/e");
    must_change(g, "-d/d -d/c");
    other_may(g, false);
    must_not_change(g, "-d/e !", EIO, "as asked");
    other_may(g, false);
    must_change(g, "-d/e");
    other_may(g, true);
    must_not_change(g, "+d/a +d/b !", EIO, "as asked");
    must_not_change(g, "+d/a +d/a", EEXIST, "already");
    must_not_change(g, "+d/a -d/a +d/b !", EIO, "as asked");
    must_change(g, "+d/a -d/a");
    other_may(g, true);
    /* It goes with its node. */
    must_change(g, "+d/a +d/b");
    must_del(g, "d");
    other_may(g, true);
    assert_int_equal(lock.told.tolerates & ACCESS_WRITE, ACCESS_WRITE);
    graph_co_free(g);
}

static void test_bitmap_guard__lasts_as_long_as_the_last_bitmap(void **state)
{
    (void)state;
    on_both(counted_body, NULL);
}

/* ---- what other programs are told ---- */

static void told_body(void *arg)
{
    static const char *const nodes[] = {"d", "file"};

    (void)arg;
    for (unsigned i = 0; i < ARRAY_SIZE(nodes); i++) {
        struct graph *g = begin();
        struct backend *b = must_attach(g, nodes[i], ACCESS_RW, "export 'e'");
        char plus[16];
        char twice[24];
        char minus[16];

        snprintf(plus, sizeof(plus), "+%s/a", nodes[i]);
        snprintf(twice, sizeof(twice), "+%s/b !", nodes[i]);
        snprintf(minus, sizeof(minus), "-%s/a", nodes[i]);
        lock.refuses = true; /* another program writes */
        must_not_change(g, plus, EAGAIN, "locked by others");
        assert_int_equal(lock.told.tolerates & ACCESS_WRITE, ACCESS_WRITE);
        lock.refuses = false;
        must_change(g, plus);
        assert_int_equal(lock.told.tolerates, OTHERS);
        assert_int_equal(lock.told.wants, ACCESS_READ | ACCESS_WRITE);
        must_not_change(g, twice, EIO, "as asked");
        assert_int_equal(lock.told.tolerates, OTHERS);
        backend_co_free(b); /* also while nobody uses it */
        assert_int_equal(lock.told.tolerates, OTHERS);
        assert_int_equal(lock.told.wants, 0);
        b = must_attach(g, nodes[i], ACCESS_RW, "export 'e'"); /* itself: no stranger */
        must_change(g, minus);
        assert_int_equal(lock.told.tolerates, ACCESS_ALL & ~(unsigned)ACCESS_RESIZE);
        backend_co_free(b);
        graph_co_free(g);
    }
}

static void test_bitmap_guard__drivers_tell_others(void **state)
{
    (void)state;
    on_both(told_body, NULL);
}

/* A change without memory, at each place: as before or as after. */
static void no_memory_body(void *arg)
{
    int r = -1;
    unsigned k = 0;

    (void)arg;
    while (r < 0) {
        struct graph *g = begin();
        struct error *err = NULL;

        alloc_fail_at(++k);
        r = change_bitmaps(g, "+d/a", &err);
        alloc_fail_at(0);
        assert_true(r == 0 || r == -ENOMEM);
        error_free(&err);
        other_may(g, r < 0);
        if (r < 0)
            must_change(g, "+d/a");
        other_may(g, false);
        r = r < 0 ? r : 0;
        graph_co_free(g);
    }
    assert_true(k > 5);
}

static void test_bitmap_guard__without_memory_nothing_is_left(void **state)
{
    (void)state;
    on_engine(LOOP_ENGINE_THREADS, no_memory_body, NULL);
}
