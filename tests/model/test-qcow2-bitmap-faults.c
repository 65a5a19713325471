/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stored bitmaps on a disk that fails, and without memory (D4): for k = 1, 2, ... the k-th operation of the disk, or the k-th allocation, fails
 * while the image is opened, while bitmaps are removed, while that is taken back, or while the image is closed. What is said to
 * be done is done; what is not has changed nothing; and the image is sound, with leaks at most.
 */
#include "bitmaps/dirty-bitmap.h"
#include "formats/list.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#include <stdio.h>

#define IMAGE_PATH "/disk/image"
#define SIZE       ((uint64_t)256 << 10)
#define BITS       ((size_t)SIZE / 512 / 8)
#define FAULTS_MAX 500

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

enum phase { PHASE_OPEN, PHASE_REMOVE, PHASE_REMOVE_LAST, PHASE_TAKE_BACK, PHASE_CLOSE, PHASES };

struct attempt {
    enum phase phase;
    struct sim_disk *disk;
    struct graph *graph;
    struct backend *backend;
    struct sim_fault fault;
    unsigned allocation; /* that fails; 0: none */
    int result;          /* of the phase */
    bool struck;
    bool uncertain; /* the header could not be written back: a sync that has failed is final */
};

static const char *const names[] = {"a", "b"};

/* Of the leak sanitizer; absent in other builds. */
void __lsan_disable(void) __attribute__((weak));
void __lsan_enable(void) __attribute__((weak));

static int fail_co_persist(struct change_action *a, struct error **err)
{
    (void)a;
    return error_set(err, ECANCELED, "this change does not happen");
}

static const struct change_action_ops fail_ops = {.co_persist = fail_co_persist};

static void add_all(struct attempt *a)
{
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        AUTO(error_free) struct error *err = NULL;
        struct dirty_bitmap_action action;
        struct change c;

        change_init(&c, a->graph, "add");
        check(dirty_bitmap_action_add(&c, &action, (struct dirty_bitmap_ref){"top", names[i]}, 512,
                                      true, &err) == 0);
        action.persistent = true;
        check(change_co_run(&c, &err) == 0);
        change_end(&c);
    }
}

/* `count` of them in one change, which fails after that if `then_fail`. */
static int remove_some(struct attempt *a, unsigned count, bool then_fail)
{
    AUTO(error_free) struct error *err = NULL;
    struct dirty_bitmap_action actions[2];
    struct change_action fails = {.node = NULL};
    struct change c;
    int r = 0;

    change_init(&c, a->graph, "remove");
    for (unsigned i = 0; r == 0 && i < count; i++)
        r = dirty_bitmap_action_remove(&c, &actions[i], (struct dirty_bitmap_ref){"top", names[i]},
                                       &err);
    if (then_fail)
        change_add_action(&c, &fails, &fail_ops);
    if (r == 0)
        r = change_co_run(&c, &err);
    change_end(&c);
    return r;
}

static void write_pattern(struct attempt *a, uint64_t offset)
{
    uint8_t data[512];

    memset(data, 5, sizeof(data));
    check(write_at(a->backend, offset, sizeof(data), data) == 0);
}

static int open_image(struct attempt *a)
{
    AUTO(error_free) struct error *err = NULL;

    a->graph = graph_new(drivers);
    return add_node(a->graph, &err,
                    "{'driver':'qcow2','node-name':'top','discard':'unmap','backing':null,"
                    "'file':{'driver':'file','filename':'" IMAGE_PATH "'}}");
}

static void attach(struct attempt *a)
{
    a->backend = must_attach(a->graph, "top", ACCESS_RW, "writer");
}

static void close_image(struct attempt *a)
{
    a->backend = backend_co_free(a->backend);
    a->graph = graph_co_free(a->graph);
}

static void begin_failing(struct attempt *a)
{
    if (a->allocation)
        (void)alloc_fail_at(a->allocation);
    else if (a->fault.at)
        sim_fault_add(&a->fault);
}

static void end_failing(struct attempt *a)
{
    if (a->allocation) {
        a->struck = alloc_fail_at(0) >= a->allocation;
    } else if (a->fault.at) {
        sim_fault_remove(&a->fault);
        a->struck = a->fault.fired;
    }
}

/* On the disk, while the image is open: closing it writes all of them anew. */
static unsigned count_listed(const struct attempt *a)
{
    static uint8_t bits[BITS];
    struct qcow2_bitmap_seen seen;
    unsigned count = 0;
    size_t len;
    uint8_t *bytes = image_load(a->disk, IMAGE_PATH, &len);
    struct qcow2_file f = qcow2_file_in_memory(bytes, len);

    while (qcow2_see_bitmap(&f, count + 1, &seen, bits, BITS) == 0)
        count++;
    free(bytes);
    return count;
}

static void attempt_it(void *arg)
{
    struct attempt *a = arg;

    if (a->phase == PHASE_OPEN)
        begin_failing(a);
    a->result = open_image(a);
    if (a->phase == PHASE_OPEN)
        end_failing(a);
    if (a->result < 0) {
        close_image(a);
        return;
    }
    attach(a);
    write_pattern(a, 0);
    if (a->phase != PHASE_OPEN)
        begin_failing(a);
    if (a->phase == PHASE_REMOVE)
        a->result = remove_some(a, 1, false);
    else if (a->phase == PHASE_REMOVE_LAST)
        a->result = remove_some(a, 2, false);
    else if (a->phase == PHASE_TAKE_BACK)
        check((a->result = remove_some(a, 2, true)) < 0);
    if (a->phase != PHASE_CLOSE)
        end_failing(a);
    a->uncertain = node_needs_reopen(graph_find(a->graph, "top"));
    if (a->result < 0 && a->phase != PHASE_CLOSE && !a->uncertain)
        check(count_listed(a) == ARRAY_SIZE(names)); /* D3 */
    close_image(a);
    if (a->phase == PHASE_CLOSE)
        end_failing(a);
}

static void live(void *arg)
{
    struct attempt *a = arg;

    check(open_image(a) == 0);
    attach(a);
    add_all(a);
    write_pattern(a, 1000);
    close_image(a);
}

/* Which of them are there, and whether those have what they should have, if they are not in use. */
static void judge(const struct attempt *a, const char *what)
{
    static uint8_t bits[BITS];
    bool there[2] = {false, false};
    struct qcow2_bitmap_seen seen;
    struct qcow2_verdict v;
    bool done = a->result == 0 && a->phase != PHASE_TAKE_BACK;
    bool right;
    size_t len;
    uint8_t *bytes;
    struct qcow2_file f;

    image_judge(a->disk, IMAGE_PATH, LEAKS_ALLOWED, &v);
    bytes = image_load(a->disk, IMAGE_PATH, &len);
    f = qcow2_file_in_memory(bytes, len);
    for (unsigned k = 1; qcow2_see_bitmap(&f, k, &seen, bits, BITS) == 0; k++) {
        /* Sectors 1 and 2 since it was made, and sector 0 if the image was opened; without memory more. */
        uint8_t least = a->phase != PHASE_OPEN || a->result == 0 ? 7 : 6;

        check(strlen(seen.name) == 1 && seen.name[0] >= 'a' && seen.name[0] <= 'b');
        there[seen.name[0] - 'a'] = true;
        check(seen.in_use ||
              (seen.enabled && (a->allocation ? (bits[0] & least) == least : bits[0] == least)));
    }
    free(bytes);
    right = (a->phase == PHASE_REMOVE && done)        ? !there[0] && there[1]
            : (a->phase == PHASE_REMOVE_LAST && done) ? !there[0] && !there[1]
                                                      : there[0] && there[1];
    /* A directory that cannot be read is dropped; so does the disk open. */
    if (a->phase == PHASE_OPEN && a->result == 0 && a->fault.fired)
        right |= !there[0] && !there[1];
    right |= a->uncertain;
    if (right)
        return;
    fprintf(stderr, "phase %d, %s: result %d, 'a' is %sthere, 'b' is %sthere\n", a->phase, what,
            a->result, there[0] ? "" : "not ", there[1] ? "" : "not ");
    abort();
}

static void run(struct attempt *a, void (*fn)(void *), uint64_t seed)
{

    check(run_on(a->disk, seed, fn, a) == SIM_RETURNED);
}

static void fail_each(enum phase phase, bool memory, const uint8_t *bytes, size_t len)
{
    struct attempt a;
    unsigned k = 0;

    do {
        char what[40];

        k++;
        a = (struct attempt){.phase = phase, .disk = sim_disk_new()};
        a.allocation = memory ? k : 0;
        a.fault = (struct sim_fault){.kind = SIM_ERROR, .error = EIO, .at = memory ? 0 : k};
        image_put(a.disk, IMAGE_PATH, bytes, len);
        /* A node that there is no memory to close stays, with all of the graph. */
        if (memory && phase == PHASE_CLOSE && __lsan_disable)
            __lsan_disable();
        run(&a, attempt_it, k);
        if (memory && phase == PHASE_CLOSE && __lsan_enable)
            __lsan_enable();
        (void)snprintf(what, sizeof(what), "%s %u", memory ? "allocation" : "operation", k);
        judge(&a, what);
        sim_disk_free(a.disk);
    } while (a.struck && k < FAULTS_MAX);
    check(k > 3 && !a.struck);
}

static void fail_everywhere(enum phase phase)
{
    static const struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = SIZE};
    struct attempt a = {.disk = sim_disk_new()};
    uint8_t *bytes;
    size_t len;

    image_make(a.disk, IMAGE_PATH, &shape);
    run(&a, live, 1);
    bytes = image_load(a.disk, IMAGE_PATH, &len);
    sim_disk_free(a.disk);
    fail_each(phase, false, bytes, len);
    fail_each(phase, true, bytes, len);
    free(bytes);
}

static void test_qcow2_bitmap_faults__while_it_opens(void **state)
{
    (void)state;
    fail_everywhere(PHASE_OPEN);
}

static void test_qcow2_bitmap_faults__while_one_is_removed(void **state)
{
    (void)state;
    fail_everywhere(PHASE_REMOVE);
}

static void test_qcow2_bitmap_faults__while_the_last_ones_are_removed(void **state)
{
    (void)state;
    fail_everywhere(PHASE_REMOVE_LAST);
}

static void test_qcow2_bitmap_faults__while_that_is_taken_back(void **state)
{
    (void)state;
    fail_everywhere(PHASE_TAKE_BACK);
}

static void test_qcow2_bitmap_faults__while_it_closes(void **state)
{
    (void)state;
    fail_everywhere(PHASE_CLOSE);
}
