/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Repairs of damaged qcow2 images, on a disk that loses power and fails: after a cut at any operation the image is no worse than
 * before, what the damage has not touched reads as ever, and the next repair ends what this one began. The judge of images shares
 * no code with the repair.
 */
#include "formats/list.h"
#include "formats/qcow2/check/qcow2-check.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "seeds.h"

#include <sys/wait.h>

#define IMAGE   "/disk/image"
#define CUTS    24
#define HARMS   4
#define GUEST   64 /* clusters */
#define FAULTED 40

#define POWER_CUTS 32 /* at each operation, where no harm is random */

/* A driver that repairs its file when it opens, as the format does (Q5). */
static int repairing_co_open(struct node *node, const void *options, struct error **err)
{
    struct pass pass = {0};
    struct request by = {.pass = &pass};

    (void)options;
    node_set_size(node, 0);
    return qcow2_co_repair_refcounts(node_file(node), &by, node_name(node), err);
}

static void repairing_co_close(struct node *node)
{
    (void)node;
}

static const struct driver repairing_driver = {
    .name = "raw",
    .kind = DRIVER_FORMAT,
    .options = &raw_options_type,
    .state_size = 8,
    .keeps_metadata = true,
    .co_open = repairing_co_open,
    .co_close = repairing_co_close,
};

static const struct driver *const test_drivers[] = {&repairing_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, protocol_drivers,
                                                      format_drivers, NULL};

struct damaged {
    uint64_t seed;
    struct qcow2_shape shape;
    struct sim_disk *disk;
    uint8_t *bytes;
    size_t len;
    bool touched[GUEST];   /* guest clusters whose mapping is harmed */
    uint64_t holds[GUEST]; /* whose data the others have: their own */
    struct qcow2_verdict before;

    enum qcow2_repair how;
    bool by_open;
    uint64_t memory_max;
    struct qcow2_check_result found;
    int result;
    char error[256];
};

/* ---- images and harm ---- */

static uint64_t cluster_of(const struct damaged *d)
{
    return (uint64_t)1 << d->shape.cluster_bits;
}

/* Of an L2 table. */
static uint64_t entry_len_of(const struct damaged *d)
{
    return d->shape.extended ? 16 : 8;
}

static void touch_table(struct damaged *d, uint64_t table)
{
    uint64_t entries = cluster_of(d) / entry_len_of(d);

    for (uint64_t g = table * entries; g < (table + 1) * entries && g < GUEST; g++)
        d->touched[g] = true;
}

/* Earlier harm may have led here: what is harmed then is a guest's. */
static void touch_data(struct damaged *d, uint64_t at)
{
    uint64_t cluster = at / cluster_of(d);
    uint64_t first = d->len / cluster_of(d) - GUEST;

    if (cluster >= first && cluster - first < GUEST)
        d->touched[cluster - first] = true;
}

/* One entry, or refcount, becomes something else. */
static void harm(struct damaged *d, struct prng *prng)
{
    uint64_t cluster = cluster_of(d);
    uint64_t clusters = d->len / cluster;
    uint64_t l1 = load_be64(d->bytes + 40);
    uint64_t table = load_be64(d->bytes + 48);
    uint64_t index = prng_below(prng, 6);
    uint64_t entries = cluster / entry_len_of(d);
    uint64_t l2_table = prng_below(prng, div_up(GUEST, entries));
    uint64_t l2 = load_be64(d->bytes + l1 + 8 * l2_table) & 0xfffffffffffe00;
    uint64_t at = table + 8 * index;
    uint64_t value;

    switch (prng_below(prng, 5)) {
    case 0: /* L1 */
        at = l1 + 8 * l2_table;
        touch_table(d, l2_table);
        break;
    case 1: /* L2 */
    case 2:
        if (l2 == 0 || l2 % cluster || l2 + cluster > d->len)
            return;
        index = prng_below(prng, MIN(entries, (uint64_t)GUEST));
        at = l2 + entry_len_of(d) * index;
        if (d->shape.extended && prng_chance(prng, 400))
            at += 8; /* the subclusters */
        if (l2_table * entries + index < GUEST)
            d->touched[l2_table * entries + index] = true;
        break;
    case 3: /* refcounts */
        at = load_be64(d->bytes + table) & ~(uint64_t)0x1ff;
        if (at == 0 || at + cluster > d->len)
            return;
        at += prng_below(prng, MIN(cluster, (uint64_t)256) - 8);
        touch_data(d, at);
        d->bytes[at] = (uint8_t)prng_below(prng, 4);
        return;
    default: /* the refcount table */
        break;
    }
    touch_data(d, at);
    value = load_be64(d->bytes + at);
    switch (prng_below(prng, 6)) {
    case 0:
        value ^= (uint64_t)1 << prng_below(prng, 64);
        break;
    case 1:
        value ^= (uint64_t)1 << 63;
        break;
    case 2:
        value = 0;
        break;
    case 3:
        value += cluster * prng_below(prng, 20);
        break;
    default:
        value = prng_below(prng, clusters) * cluster | prng_below(prng, 2) << 63;
        break;
    }
    store_be64(d->bytes + at, value);
}

static void fill(uint8_t *data, uint64_t len, uint64_t guest)
{
    for (uint64_t i = 0; i + 8 <= len; i += 8)
        store_be64(data + i, (guest + 1) << 32 | i);
}

static void fill_all(struct damaged *d)
{
    uint64_t first = d->len / cluster_of(d) - GUEST;

    for (uint64_t g = 0; g < GUEST; g++) {
        d->holds[g] = g;
        fill(d->bytes + (first + g) * cluster_of(d), cluster_of(d), g);
    }
}

/* False for harm that the judge does not judge: compressed entries. */
static bool damaged_init(struct damaged *d, uint64_t seed)
{
    struct prng prng = {seed};
    struct qcow2_file f;

    *d = (struct damaged){.seed = seed, .how = QCOW2_REPAIR_ALL, .memory_max = 1 << 24};
    qcow2_shape_random(&d->shape, &prng, 0);
    d->shape.cluster_bits = MIN(d->shape.cluster_bits, d->shape.extended ? 14u : 12u);
    d->shape.size = GUEST << d->shape.cluster_bits;
    d->shape.allocated = GUEST;
    d->by_open = prng_chance(&prng, 300);
    d->bytes = qcow2_make(&d->shape, &d->len);
    fill_all(d);
    for (uint64_t i = 1 + prng_below(&prng, HARMS); i > 0; i--)
        harm(d, &prng);
    if (d->shape.version == 3 && prng_chance(&prng, 500))
        d->bytes[79] |= 1; /* dirty */
    f = qcow2_file_in_memory(d->bytes, d->len);
    return qcow2_check(&f, &d->before) == 0;
}

static void damaged_release(struct damaged *d)
{
    free(d->bytes);
    sim_disk_free(d->disk);
}

/* ---- repairing ---- */

static void by_backend(struct damaged *d, struct graph *g, struct error **err)
{
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE | ACCESS_RESIZE,
                            .tolerates = ACCESS_READ};
    struct qcow2_check_options o = {.repair = d->how, .memory_max = d->memory_max};
    struct backend *b;

    d->result = add_node(g, err, "{'driver':'file','node-name':'f','filename':'" IMAGE "'}");
    if (d->result == 0)
        d->result = backend_co_new(&b, g, "f", access, "repair", err);
    if (d->result < 0)
        return;
    check(backend_attach(b) == 0);
    d->result = qcow2_co_check(b, &o, &d->found, err);
    backend_co_free(b);
}

static void repair_it(void *arg)
{
    struct damaged *d = arg;
    struct error *err = NULL;
    struct graph *g = graph_new(drivers);

    d->found = (struct qcow2_check_result){0};
    if (d->by_open)
        d->result = add_node(
            g, &err,
            "{'driver':'raw','node-name':'n','file':{'driver':'file','filename':'" IMAGE "'}}");
    else
        by_backend(d, g, &err);
    if (d->result < 0)
        (void)snprintf(d->error, sizeof(d->error), "%s", error_text(err));
    error_free(&err);
    graph_co_free(g);
}

static void put_image(struct damaged *d)
{
    sim_disk_free(d->disk);
    d->disk = sim_disk_new();
    image_put(d->disk, IMAGE, d->bytes, d->len);
}

static enum sim_end repair_until(struct damaged *d, uint64_t kill_at_op, struct sim_fault *fault)
{
    struct sim_options o;

    sim_options_init(&o, d->seed);
    o.disk = d->disk;
    o.short_per_mille = 0;
    o.may_end_early = true;
    o.kill_at_op = kill_at_op;
    o.faults = &fault;
    o.fault_count = fault ? 1 : 0;
    return sim_run(&o, repair_it, d);
}

/* ---- judging ---- */

/* What no harm was done to reads as ever. */
static void check_guest(struct damaged *d, uint8_t *bytes, size_t len)
{
    struct qcow2_layer layer = {.file = qcow2_file_in_memory(bytes, len)};
    uint64_t cluster = cluster_of(d);
    uint8_t *expected = xalloc(2, cluster);

    for (uint64_t g = 0; g < GUEST; g++) {
        if (d->touched[g])
            continue;
        fill(expected, cluster, d->holds[g]);
        check(qcow2_read_guest(&layer, 1, g * cluster, expected + cluster, cluster) == 0);
        check(memcmp(expected, expected + cluster, cluster) == 0);
    }
    free(expected);
}

/* What the judge calls errors, and is none: clusters that guests share, and what only version 3 has. */
static unsigned tolerated(const struct qcow2_verdict *v)
{
    return v->by_kind[QCOW2_ERROR_ZERO_V2] + v->by_kind[QCOW2_ERROR_NOWHERE] +
           v->by_kind[QCOW2_ERROR_USED_TWICE];
}

/* `sound`: it is repaired. */
static void judge(struct damaged *d, bool sound)
{
    const unsigned *before = d->before.by_kind;
    struct qcow2_verdict v;
    struct qcow2_file f;
    size_t len;
    uint8_t *bytes = image_load(d->disk, IMAGE, &len);

    f = qcow2_file_in_memory(bytes, len);
    check(qcow2_check(&f, &v) == 0);
    if (d->before.by_kind[QCOW2_ERROR_DIRTY] && !v.by_kind[QCOW2_ERROR_DIRTY])
        sound = true; /* it says so itself */
    if (v.by_kind[QCOW2_ERROR_REFCOUNT_LOW] > before[QCOW2_ERROR_REFCOUNT_LOW] ||
        v.by_kind[QCOW2_ERROR_USED_TWICE] > before[QCOW2_ERROR_USED_TWICE] ||
        (sound && (v.errors != tolerated(&v) || v.leaks != v.leaks_beyond))) {
        fprintf(stderr, "before:\n%s\nnow:\n%s", d->before.text, v.text);
        abort();
    }
    check_guest(d, bytes, len);
    free(bytes);
}

static void repair_whole(struct damaged *d)
{
    check(repair_until(d, 0, NULL) == SIM_RETURNED);
    if (d->result < 0 || d->found.corruptions || d->found.leaks) {
        fprintf(stderr, "%d: %s: %" PRIu64 " corruptions, %" PRIu64 " leaks left of\n%s", d->result,
                d->error, d->found.corruptions, d->found.leaks, d->before.text);
        abort();
    }
    judge(d, true);
}

/* Of a whole one. */
static uint64_t ops_of_repair(struct damaged *d)
{
    uint64_t before;

    put_image(d);
    before = sim_disk_ops(d->disk);
    repair_whole(d);
    return sim_disk_ops(d->disk) - before;
}

static void cut_everywhere(struct damaged *d)
{
    struct prng prng = {d->seed + 9};
    uint64_t ops = ops_of_repair(d);

    for (unsigned i = 0; i < CUTS; i++) {
        put_image(d);
        if (repair_until(d, sim_disk_ops(d->disk) + 1 + prng_below(&prng, ops), NULL) ==
                SIM_KILLED &&
            i % 4)
            sim_disk_power_cut(d->disk, 1 + prng_next(&prng) % 1000000);
        judge(d, false);
        repair_whole(d);
    }
}

static void cut_at_each(struct damaged *d)
{
    uint64_t ops = ops_of_repair(d);

    for (uint64_t i = 0; i < ops * POWER_CUTS; i++) {
        put_image(d);
        if (repair_until(d, sim_disk_ops(d->disk) + 1 + i % ops, NULL) == SIM_KILLED)
            sim_disk_power_cut(d->disk, 1 + i);
        judge(d, false);
        repair_whole(d);
    }
}

static void fail_everywhere(struct damaged *d)
{
    for (uint64_t k = 1; k <= FAULTED; k++) {
        struct sim_fault fault = {.name = IMAGE, .kind = SIM_ERROR, .error = EIO, .at = k};

        put_image(d);
        check(repair_until(d, 0, &fault) == SIM_RETURNED);
        judge(d, false);
        repair_whole(d);
        if (!fault.fired)
            break;
    }
}

/* What a repair does after a failure is not undone by what it does later. */
static void fail_and_kill_everywhere(struct damaged *d)
{
    uint64_t ops = ops_of_repair(d);

    for (uint64_t k = 1; k <= ops; k++) {
        for (uint64_t kill = k; kill <= 2 * ops; kill++) {
            struct sim_fault fault = {.name = IMAGE, .kind = SIM_ERROR, .error = EIO, .at = k};

            put_image(d);
            if (repair_until(d, sim_disk_ops(d->disk) + kill, &fault) != SIM_KILLED)
                break;
            judge(d, false);
        }
    }
}

static void in_child(void (*fn)(struct damaged *d), uint64_t seed)
{
    pid_t child;
    int status;

    fflush(NULL);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        static struct damaged d;

        if (damaged_init(&d, seed))
            fn(&d);
        damaged_release(&d);
        fflush(NULL);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static void test_qcow2_repair__power_cuts_leave_it_no_worse(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        in_child(cut_everywhere, seed);
}

static void test_qcow2_repair__failures_leave_it_no_worse(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        in_child(fail_everywhere, seed);
}

/* ---- without harm at random ---- */

static void judge_before(struct damaged *d)
{
    struct qcow2_file f = qcow2_file_in_memory(d->bytes, d->len);

    assert_int_equal(qcow2_check(&f, &d->before), 0);
}

static void sound_image_of_width(struct damaged *d, unsigned refcount_order)
{
    *d = (struct damaged){.seed = 1, .how = QCOW2_REPAIR_ALL, .memory_max = 1 << 24};
    d->shape = (struct qcow2_shape){.version = 3,
                                    .cluster_bits = 9,
                                    .refcount_order = refcount_order,
                                    .size = GUEST << 9,
                                    .allocated = GUEST};
    d->bytes = qcow2_make(&d->shape, &d->len);
    fill_all(d);
    judge_before(d);
}

static void sound_image(struct damaged *d)
{
    sound_image_of_width(d, 4);
}

/* Of the only one. */
static uint64_t l2_of(const struct damaged *d)
{
    return load_be64(d->bytes + load_be64(d->bytes + 40)) & 0xfffffffffffe00;
}

static void test_qcow2_repair__check_alone_writes_nothing(void **state)
{
    struct damaged d;
    uint8_t *after;
    size_t len;

    (void)state;
    sound_image(&d);
    d.bytes[79] = 3;                                               /* dirty, corrupt */
    d.bytes[load_be64(d.bytes + load_be64(d.bytes + 48)) + 9] = 0; /* a refcount */
    d.how = QCOW2_REPAIR_NOTHING;
    put_image(&d);
    assert_int_equal(repair_until(&d, 0, NULL), SIM_RETURNED);
    assert_int_equal(d.result, 0);
    assert_true(d.found.corruptions > 0);
    after = image_load(d.disk, IMAGE, &len);
    assert_int_equal(len, d.len);
    assert_memory_equal(after, d.bytes, len);
    free(after);
    damaged_release(&d);
}

static void test_qcow2_repair__dirty_image_is_repaired_by_open(void **state)
{
    struct damaged d;
    uint8_t *after;
    size_t len;

    (void)state;
    sound_image(&d);
    d.bytes[79] = 1;
    memset(d.bytes + load_be64(d.bytes + load_be64(d.bytes + 48)), 0, 512); /* refcounts */
    d.before.by_kind[QCOW2_ERROR_REFCOUNT_LOW] = 1000;
    d.by_open = true;
    put_image(&d);
    assert_int_equal(repair_until(&d, 0, NULL), SIM_RETURNED);
    assert_int_equal(d.result, 0);
    judge(&d, true);
    after = image_load(d.disk, IMAGE, &len);
    assert_int_equal(after[79], 0);
    free(after);
    damaged_release(&d);
}

/* What a snapshot that is gone has left: counted twice, used once, without the flag. Repaired as leaks it is no damage afterwards. */
static void test_qcow2_repair__leaks_take_their_flags_with_them(void **state)
{
    struct damaged d;
    uint64_t table;
    uint64_t block;
    uint64_t l2;
    uint64_t data;

    (void)state;
    sound_image(&d);
    table = load_be64(d.bytes + 48);
    block = load_be64(d.bytes + table);
    l2 = l2_of(&d);
    data = load_be64(d.bytes + l2) & 0xfffffffffffe00;
    d.bytes[load_be64(d.bytes + 40)] &= 0x7f;
    d.bytes[l2] &= 0x7f;
    store_be16(d.bytes + block + l2 / 512 * 2, 2);
    store_be16(d.bytes + block + data / 512 * 2, 2);
    d.how = QCOW2_REPAIR_LEAKS;
    put_image(&d);
    assert_int_equal(repair_until(&d, 0, NULL), SIM_RETURNED);
    assert_int_equal(d.result, 0);
    assert_int_equal(d.found.leaks_fixed, 2);
    assert_int_equal(d.found.leaks, 0);
    assert_int_equal(d.found.corruptions, 0);
    judge(&d, true);
    damaged_release(&d);
}

/* Flags alone are mended, too; beside other damage they are left. */
static void test_qcow2_repair__flags_are_left_beside_other_damage(void **state)
{
    (void)state;
    for (unsigned worse = 0; worse < 2; worse++) {
        struct damaged d;
        uint64_t l2;

        sound_image(&d);
        l2 = l2_of(&d);
        d.bytes[l2] &= 0x7f;
        if (worse)
            store_be64(d.bytes + l2 + 8, load_be64(d.bytes + l2 + 8) | 2); /* reserved */
        d.how = QCOW2_REPAIR_LEAKS;
        put_image(&d);
        assert_int_equal(repair_until(&d, 0, NULL), SIM_RETURNED);
        assert_int_equal(d.result, 0);
        assert_int_equal(d.found.corruptions, worse ? 2 : 0);
        assert_int_equal(d.found.corruptions_fixed, worse ? 0 : 1);
        damaged_release(&d);
    }
}

/* Refcounts of a bit: what two guests share has to be copied for one of them. */
static void test_qcow2_repair__what_moves_is_durable_where_it_goes(void **state)
{
    struct damaged d;
    uint64_t l2;

    (void)state;
    sound_image_of_width(&d, 0);
    l2 = l2_of(&d);
    memcpy(d.bytes + l2 + 8 * 5, d.bytes + l2 + 8 * 6, 8);
    d.holds[5] = 6;
    judge_before(&d);
    cut_at_each(&d);
    damaged_release(&d);
}

/* The refcounts of the last clusters are lost; those of the others must not be, whenever the power goes. */
static void test_qcow2_repair__new_refcounts_are_durable_before_the_old_ones_go(void **state)
{
    struct damaged d;
    uint64_t table;

    (void)state;
    sound_image_of_width(&d, 6); /* 64 in a block */
    table = load_be64(d.bytes + 48);
    store_be64(d.bytes + table + 8, load_be64(d.bytes + table + 8) | 2);
    judge_before(&d);
    cut_at_each(&d);
    damaged_release(&d);
}

/* An entry that is mended is a few refcounts, too. */
static void test_qcow2_repair__entries_in_a_refcount_block_are_mended_after_it(void **state)
{
    struct damaged d;
    uint64_t l2;

    (void)state;
    sound_image(&d);
    l2 = l2_of(&d);
    store_be64(d.bytes + load_be64(d.bytes + 48), l2);
    store_be64(d.bytes + l2 + 8 * 5, UINT64_C(1) << 63 | UINT64_C(1) << 40); /* not in the file */
    d.touched[5] = true;
    judge_before(&d);
    cut_at_each(&d);
    damaged_release(&d);
}

/* What a table points to that cannot be read any more is not free. */
static void test_qcow2_repair__tables_that_fail_later_take_nothing_along(void **state)
{
    struct damaged d;
    uint64_t l2;
    uint64_t data;

    (void)state;
    sound_image(&d);
    l2 = l2_of(&d);
    data = load_be64(d.bytes + l2) & 0xfffffffffffe00;
    store_be16(d.bytes + load_be64(d.bytes + load_be64(d.bytes + 48)) + data / 512 * 2, 2);
    judge_before(&d);
    fail_and_kill_everywhere(&d);
    damaged_release(&d);
}

static void test_qcow2_repair__memory_is_bounded(void **state)
{
    struct damaged d;

    (void)state;
    sound_image(&d);
    d.memory_max = 9000; /* less than a leaf and the table of leaves */
    put_image(&d);
    assert_int_equal(repair_until(&d, 0, NULL), SIM_RETURNED);
    assert_int_equal(d.result, -ENOMEM);
    damaged_release(&d);
}

/* An L1 table of which all entries name one L2 table: that is read once. */
static void test_qcow2_repair__shared_tables_cost_once(void **state)
{
    struct damaged d;
    uint64_t l1;

    (void)state;
    sound_image(&d);
    l1 = load_be64(d.bytes + 40);
    store_be64(d.bytes + l1 + 8, load_be64(d.bytes + l1));
    store_be32(d.bytes + 36, 64); /* entries: as many as the cluster has */
    for (unsigned i = 0; i < 64; i++)
        store_be64(d.bytes + l1 + 8 * i, load_be64(d.bytes + l1));
    d.how = QCOW2_REPAIR_NOTHING;
    put_image(&d);
    assert_int_equal(repair_until(&d, 0, NULL), SIM_RETURNED);
    assert_int_equal(d.result, 0);
    assert_in_range(sim_disk_ops(d.disk), 1, 40);
    damaged_release(&d);
}
