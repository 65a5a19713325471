/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Power cuts under qcow2 (P1, Q1, Q4): a run is killed at each boundary of each flush of the image file, and at random
 * operations between, also while it opens and closes; what was not flushed is kept, dropped or torn, each write by itself.
 * Then the image has leaks at most, opens, shows each sector as one of the values that it may have, and can be written on. Between
 * writers the size changes, clusters are preallocated, and snapshots are made, applied and deleted, in some of the cases: these hold
 * what they held. Others are encrypted.
 *
 *     writers            some on loops of their own, over each other's sectors
 *        |
 *      qcow2  --backing--> qcow2
 *        |                   |
 *     watch                 file
 *        |
 *      file
 */
#include "base/checked.h"
#include "crash-fixture.h"
#include "crypt-fixture.h"
#include "formats/list.h"
#include "formats/qcow2/qcow2-preallocate.h"
#include "formats/qcow2/qcow2-snapshot.h"
#include "graph/offload.h"
#include "logged-disk.h"
#include "protocols/list.h"
#include "seeds.h"

#define WRITERS_MAX 3
#define BOUNDS_MAX  400
#define RANDOM_CUTS 5
#define TOP         "/disk/top"
#define BASE        "/disk/base"
#define DATA        "top.data"
#define WELL        "/disk/well"
#define WELL_ROOM   ((uint64_t)512 * LOG_SECTOR)
#define BASE_VALUES ((uint64_t)1 << 40)
#define KEPT_MAX    4

static const struct driver *const test_drivers[] = {&flush_filter_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, protocol_drivers,
                                                      format_drivers, NULL};

/* A way to use an image. Constant for a seed. */
struct plan {
    uint64_t seed;
    struct qcow2_shape shape;
    struct qcow2_shape base;
    bool has_base;
    bool resizes;
    bool keeps;     /* snapshots */
    bool encrypted; /* the top */
    unsigned writers;
    unsigned ops;
    unsigned bounds; /* that are tried, about; all of them when there are no more */
    unsigned span;   /* sectors from here on only are written: where the unallocated ones begin */
};

/* A snapshot: while it comes, or goes, the image may have it or not. */
enum kept_state { KEPT_COMES, KEPT_THERE, KEPT_GOES, KEPT_GONE };

struct kept {
    enum kept_state state;
    char name[16];
    uint64_t size;
    uint8_t *data; /* what it holds; zeroes beyond its size */
};

/* One run of it. */
struct run {
    const struct plan *plan;
    struct sim_disk *disk;
    struct sector_log log;
    struct graph *graph;
    struct backend *backend;
    struct backend *well; /* where what the host copies comes from */
    struct loop_thread *threads[WRITERS_MAX];
    uint64_t sectors;   /* of the disk at first */
    uint64_t size_now;  /* as the last resize left it */
    uint64_t sizes[16]; /* that a power cut may leave; the first is the one at first */
    unsigned size_count;
    struct kept kept[KEPT_MAX];
    unsigned kept_count;

    /* Operations of the file after which the power may fail just before or just after a flush. */
    uint64_t bounds[BOUNDS_MAX];
    unsigned bound_count;
};

/* Counts over all seeds; shared with the children. */
static struct counts {
    uint64_t cuts;
    uint64_t kills;
    uint64_t boundaries;
    uint64_t leaking;
    uint64_t compressed; /* images with compressed clusters after a cut */
    uint64_t copied;     /* by the host, of all runs */
    uint64_t lost;       /* sectors whose last value did not survive */
    uint64_t kept;       /* snapshots that were looked at */
} * counts;

static int group_setup(void **state)
{
    (void)state;
    counts = shared_new(sizeof(*counts));
    return 0;
}

/* ---- the run ---- */

static void note_bound(void *arg, bool after)
{
    struct run *r = arg;

    (void)after;
    if (r->bound_count < BOUNDS_MAX)
        r->bounds[r->bound_count++] = sim_disk_ops(r->disk) + 1;
}

struct writer {
    struct run *run;
    unsigned number;
    struct prng prng;
};

static void write_sectors(struct run *r, uint64_t first, uint64_t count, unsigned flags)
{
    check(logged_write(r->backend, &r->log, first, count, flags) == 0);
}

/* As a write, by the host if it can be; each writer has a room of its own in the other file. */
static void copy_sectors(struct writer *w, uint64_t first, uint64_t count, bool fua)
{
    struct run *r = w->run;
    uint64_t value = log_new_value(&r->log);
    uint64_t room = w->number * WELL_ROOM;
    uint8_t *data = xalloc(count, LOG_SECTOR);
    unsigned flags = fua ? REQUEST_FUA : 0;
    uint32_t op;
    int result;

    for (uint64_t i = 0; i < count; i++)
        log_fill(data + i * LOG_SECTOR, first + i, value);
    sim_disk_write(r->disk, WELL, room, data, count * LOG_SECTOR);
    op = log_begin(&r->log, first, count, value, false);
    result =
        backend_co_copy(r->well, room, r->backend, first * LOG_SECTOR, count * LOG_SECTOR, flags);
    check(result == 0 || result == -EOPNOTSUPP);
    counts->copied += result == 0;
    if (result < 0)
        result = send_request(r->backend, REQUEST_WRITE, flags, first * LOG_SECTOR,
                              count * LOG_SECTOR, data);
    check(result == 0);
    log_end(&r->log, op, fua, false);
    free(data);
}

/* Whole clusters around that, or to the end of the disk. */
static void write_compressed(struct run *r, uint64_t first, uint64_t count)
{
    uint64_t per_cluster = ((uint64_t)1 << r->plan->shape.cluster_bits) / LOG_SECTOR;
    uint64_t from = align_down(first, per_cluster);
    uint64_t to = MIN(align_up(first + count, per_cluster), r->size_now / LOG_SECTOR);

    write_sectors(r, from, MIN(to - from, 2 * per_cluster),
                  r->plan->shape.data_file || r->plan->encrypted ? 0 : REQUEST_COMPRESSED);
}

static void zero_sectors(struct run *r, uint64_t first, uint64_t count, unsigned flags)
{
    check(logged_clear(r->backend, &r->log, REQUEST_WRITE_ZEROES, first, count, flags) == 0);
}

static void discard_sectors(struct run *r, uint64_t first, uint64_t count)
{
    check(logged_clear(r->backend, &r->log, REQUEST_DISCARD, first, count, 0) == 0);
}

static void read_sectors(struct run *r, uint64_t first, uint64_t count)
{
    check(logged_read(r->backend, &r->log, first, count) == 0);
}

/* Whole clusters, parts of one, or a bit of several; seldom many. */
static void choose_sectors(struct writer *w, uint64_t *first, uint64_t *count)
{
    const struct plan *p = w->run->plan;
    uint64_t sectors = w->run->size_now / LOG_SECTOR;
    uint64_t per_cluster = ((uint64_t)1 << p->shape.cluster_bits) / LOG_SECTOR;
    uint64_t from = p->span < sectors && !prng_chance(&w->prng, 200) ? p->span : 0;

    *first = from + prng_below(&w->prng, sectors - from);
    if (prng_chance(&w->prng, 400))
        *first -= *first % per_cluster;
    *count = prng_chance(&w->prng, 500) ? per_cluster : 1 + prng_below(&w->prng, 2 * per_cluster);
    if (prng_chance(&w->prng, 80))
        *count *= 8;
    *count = MIN(*count, sectors - *first);
    *count = MIN(*count, (uint64_t)512);
}

static void write_a_bit(void *arg)
{
    struct writer *w = arg;
    struct run *r = w->run;

    check(backend_attach(r->backend) == 0 && backend_attach(r->well) == 0);
    for (unsigned i = 0; i < r->plan->ops; i++) {
        uint64_t first, count;

        choose_sectors(w, &first, &count);
        switch (prng_below(&w->prng, 26)) {
        case 0:
        case 1:
            zero_sectors(r, first, count, 0);
            break;
        case 2:
            zero_sectors(r, first, count, REQUEST_MAY_UNMAP);
            break;
        case 3:
        case 4:
        case 5:
            discard_sectors(r, first, count);
            break;
        case 6:
        case 7:
        case 8:
            (void)logged_flush(r->backend, &r->log);
            break;
        case 9:
            write_sectors(r, first, count, REQUEST_FUA);
            break;
        case 10:
            read_sectors(r, first, count);
            break;
        case 11:
        case 12:
            write_compressed(r, first, count);
            break;
        case 13:
        case 14:
        case 15:
        case 16:
            copy_sectors(w, first, count, prng_chance(&w->prng, 200));
            break;
        default:
            write_sectors(r, first, count, 0);
            break;
        }
    }
}

static void write_there(void *arg)
{
    struct writer *w = arg;

    check(loop_co_call(loop_thread_loop(w->run->threads[w->number]), write_a_bit, w) == 0);
}

/* One change of the size between two rounds of writers: what is cut off, and what comes back, is zero. */
static void resize(struct run *r, struct prng *prng)
{
    AUTO(error_free) struct error *err = NULL;
    uint64_t most = r->sectors * LOG_SECTOR;
    uint64_t size = (1 + prng_below(prng, r->sectors)) * LOG_SECTOR;
    uint64_t first;
    uint32_t op;
    int result;

    if (r->size_count == 1 && prng_chance(prng, 700))
        size = most - prng_below(prng, 64) * LOG_SECTOR;
    first = MIN(size, r->size_now) / LOG_SECTOR;
    op = log_begin(&r->log, first, r->sectors - first, 0, false);
    r->sizes[r->size_count++] = size;
    result = graph_co_resize(r->graph, "top", size, &err);
    if (result == -EOPNOTSUPP && r->plan->shape.version == 2 && r->plan->has_base) {
        log_end(&r->log, op, false, true); /* version 2 cannot hide what lies below */
        return;
    }
    if (result < 0) {
        fprintf(stderr, "resize to %" PRIu64 ": %s\n", size, error_text(err));
        abort();
    }
    log_end(&r->log, op, false, false);
    r->size_now = size;
}

/* What has come into sight, and more, gets clusters, or some of it does. */
static void preallocate(struct run *r, struct prng *prng)
{
    AUTO(error_free) struct error *err = NULL;
    uint64_t from = prng_below(prng, r->size_now);
    uint64_t start = log_tick(&r->log);
    int result = qcow2_co_preallocate(r->backend, from, r->size_now, &err);

    if (result == 0)
        log_flushed(&r->log, start);
    else
        check(result == -EOPNOTSUPP && r->plan->encrypted && r->plan->shape.version == 2);
}

/* ---- snapshots, while nobody writes ---- */

static void keep_disk(struct run *r)
{
    AUTO(error_free) struct error *err = NULL;
    struct kept *k = &r->kept[r->kept_count];
    struct qcow2_snapshot_new how = {.name = k->name, .date_s = 1};
    uint64_t start = log_tick(&r->log);
    int result;

    (void)snprintf(k->name, sizeof(k->name), "s%u", r->kept_count);
    k->size = r->size_now;
    k->data = xalloc(r->sectors, LOG_SECTOR);
    check(read_at(r->backend, 0, k->size, k->data) == 0);
    k->state = KEPT_COMES;
    r->kept_count++;
    result = qcow2_co_snapshot_create(r->backend, &how, &err);
    check(result == 0 || (result == -EFBIG && r->plan->shape.refcount_order < 3));
    k->state = result == 0 ? KEPT_THERE : KEPT_GONE;
    if (result == 0)
        log_flushed(&r->log, start);
}

static void drop_kept(struct run *r, struct kept *k)
{
    AUTO(error_free) struct error *err = NULL;

    k->state = KEPT_GOES;
    check(qcow2_co_snapshot_delete(r->backend, k->name, &err) == 0);
    k->state = KEPT_GONE;
}

/* As if each sector were written anew; not where there are pieces of several values. */
static void apply_kept(struct run *r, const struct kept *k)
{
    AUTO(error_free) struct error *err = NULL;
    uint32_t *ops = xalloc(r->sectors, sizeof(*ops));
    uint64_t ready = 0;
    bool vm_state;
    int result = -EFBIG;

    while (ready < r->sectors && log_value(k->data + ready * LOG_SECTOR, ready) != LOG_ALIEN)
        ready++;
    if (ready == r->sectors) {
        for (uint64_t i = 0; i < r->sectors; i++)
            ops[i] = log_begin(&r->log, i, 1, log_value(k->data + i * LOG_SECTOR, i), false);
        r->sizes[r->size_count++] = k->size;
        result = qcow2_co_snapshot_apply(r->backend, k->name, &vm_state, &err);
        check(result == 0 || (result == -EFBIG && r->plan->shape.refcount_order < 3));
        for (uint64_t i = 0; i < r->sectors; i++)
            log_end(&r->log, ops[i], true, result < 0);
    }
    if (result == 0)
        r->size_now = k->size;
    free(ops);
}

static void change_kept(struct run *r, struct prng *prng)
{
    struct kept *k = r->kept_count ? &r->kept[prng_below(prng, r->kept_count)] : NULL;

    if (k && k->state == KEPT_THERE && prng_chance(prng, 300))
        apply_kept(r, k);
    if (k && k->state == KEPT_THERE && prng_chance(prng, 400))
        drop_kept(r, k);
    if (r->kept_count < KEPT_MAX)
        keep_disk(r);
}

/* ---- the whole ---- */

/* `options`: of the top, each with a comma behind it. */
static void open_disk_with(struct run *r, bool watched, const char *options)
{
    struct access reads = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};

    r->graph = graph_new(drivers);
    if (r->plan->encrypted)
        crypt_add_secrets(r->graph);
    layer_options = ""; /* a run that was killed has left others */
    if (r->plan->has_base)
        add_layer(r->graph, "base", BASE, NULL, true);
    layer_options = options;
    if (watched)
        add_watched_layer(r->graph, "top", TOP, r->plan->has_base ? "base" : NULL,
                          r->plan->shape.data_file ? "/disk/" DATA : NULL);
    else
        add_layer(r->graph, "top", TOP, r->plan->has_base ? "base" : NULL,
                  strstr(options, "'snapshot'"));
    layer_options = "";
    add_or_die(r->graph,
               "{'driver':'file','node-name':'well','read-only':true,'filename':'" WELL "'}");
    r->well = must_attach(r->graph, "well", reads, "writer");
}

#define KEY "'encrypt':{'format':'luks','key-secret':'a'},"

static void open_disk(struct run *r, bool watched)
{
    open_disk_with(r, watched, r->plan->encrypted ? KEY : "");
    r->backend = must_attach(r->graph, "top", ACCESS_RW, "writer");
}

static void close_disk(struct run *r)
{
    r->backend = backend_co_free(r->backend);
    r->well = backend_co_free(r->well);
    r->graph = graph_co_free(r->graph);
}

static void round_of_writers(struct run *r, unsigned number)
{
    struct writer writers[WRITERS_MAX];
    struct co_scope s;

    co_scope_init(&s);
    for (unsigned i = 0; i < r->plan->writers; i++) {
        writers[i] = (struct writer){r, i, {r->plan->seed * 100 + number * 10 + i}};
        check(co_scope_start(&s, write_there, &writers[i]) == 0);
    }
    co_scope_join(&s);
}

static void run_plan(void *arg)
{
    struct run *r = arg;
    struct prng prng = {r->plan->seed + 77};
    struct error *err = NULL;

    flush_watch = (struct flush_watch){.around = note_bound, .arg = r};
    for (unsigned i = 0; i < r->plan->writers; i++)
        check(loop_thread_start(&r->threads[i], "io", &err) == 0);
    open_disk(r, true);
    for (unsigned i = 0; i < (r->plan->keeps ? 3 : 2); i++) {
        round_of_writers(r, i);
        if (r->plan->keeps)
            change_kept(r, &prng);
        if (r->plan->resizes)
            resize(r, &prng);
        if (r->plan->resizes && prng_chance(&prng, 300))
            preallocate(r, &prng);
    }
    close_disk(r);
    for (unsigned i = 0; i < r->plan->writers; i++)
        loop_thread_stop(r->threads[i]);
}

/* ---- after the cut ---- */

/* A snapshot through the driver. */
static void look_at_kept(struct run *r, const struct kept *k)
{
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    uint8_t *data = xalloc(r->sectors, LOG_SECTOR);
    char options[200];

    (void)snprintf(options, sizeof(options), "'snapshot':{'name':'%s'},%s", k->name,
                   r->plan->encrypted ? KEY : "");
    open_disk_with(r, false, options);
    r->backend = must_attach(r->graph, "top", access, "reader");
    check(backend_size(r->backend) == k->size);
    check(read_at(r->backend, 0, k->size, data) == 0);
    check(memcmp(data, k->data, k->size) == 0);
    close_disk(r);
    free(data);
}

/* What the image lists: all that are there, and no others. */
static void look_at_all_kept(void *arg)
{
    struct run *r = arg;
    struct qcow2_snapshot_seen seen;
    size_t len;
    uint8_t *bytes = image_load(r->disk, TOP, &len);
    struct qcow2_file f = qcow2_file_in_memory(bytes, len);
    unsigned number = 1;

    for (unsigned i = 0; i < r->kept_count; i++) {
        const struct kept *k = &r->kept[i];
        bool found = k->state != KEPT_GONE && qcow2_see_snapshot(&f, number, &seen) == 0 &&
                     strcmp(seen.name, k->name) == 0;

        check(found || k->state != KEPT_THERE);
        if (!found)
            continue;
        check(seen.disk_size == k->size);
        look_at_kept(r, k);
        number++;
        counts->kept++;
    }
    check(qcow2_see_snapshot(&f, number, &seen) == -ENOENT);
    free(bytes);
}

/* All that the disk shows, as one who opens it after the crash, reads it, and writes on. */
static void look_and_write_on(void *arg)
{
    struct run *r = arg;
    const char *const paths[] = {TOP, BASE};
    struct error *err = NULL;
    struct writer w = {r, 0, {r->plan->seed + 5}};
    uint64_t size;
    uint8_t *data, *judged;
    bool known = false;

    check(loop_thread_start(&r->threads[0], "io", &err) == 0);
    judged = xalloc(r->sectors, LOG_SECTOR);
    data = xalloc(r->sectors, LOG_SECTOR);
    open_disk(r, false);
    size = backend_size(r->backend);
    for (unsigned i = 0; i < r->size_count; i++)
        known |= r->sizes[i] == size;
    check(known);
    r->size_now = size;
    check(read_at(r->backend, 0, size, data) == 0);
    if (!r->plan->encrypted) {
        image_read_guest(r->disk, paths, r->plan->has_base ? 2 : 1, 0, judged, size);
        check(memcmp(data, judged, size) == 0);
    }
    log_check_survivors(&r->log, 0, size / LOG_SECTOR, data);
    for (uint64_t i = 0; i < size / LOG_SECTOR; i++) {
        const struct log_sector *s = &r->log.sectors[i];
        uint64_t value = log_value(data + i * LOG_SECTOR, i);

        counts->lost += s->count && r->log.ops[s->ops[s->count - 1]].value != value;
        /* From here on the log goes on with what there is. */
        r->log.sectors[i].initial = value;
        r->log.sectors[i].count = 0;
        if (value == LOG_ALIEN) /* pieces of several that were written at once */
            write_sectors(r, i, 1, 0);
    }
    check(loop_co_call(loop_thread_loop(r->threads[0]), write_a_bit, &w) == 0);
    (void)logged_flush(r->backend, &r->log);
    check(backend_attach(r->backend) == 0);
    read_sectors(r, 0, size / LOG_SECTOR);
    close_disk(r);
    loop_thread_stop(r->threads[0]);
    free(judged);
    free(data);
}

/* Content of the base: sectors with values that no writer has, and holes. */
static void make_base(struct sim_disk *d, const struct plan *p, struct sector_log *log)
{
    uint64_t cluster = (uint64_t)1 << p->base.cluster_bits;
    struct prng prng = {p->seed + 3};
    size_t len;
    uint8_t *bytes = qcow2_make(&p->base, &len);
    uint64_t data = len / cluster - p->base.allocated;

    for (uint64_t i = 0; i < p->base.allocated * (cluster / LOG_SECTOR); i++) {
        uint64_t value = prng_chance(&prng, 800) ? BASE_VALUES + i : 0;

        log_fill(bytes + data * cluster + i * LOG_SECTOR, i, value);
        if (i < MIN(p->shape.size, p->base.size) / LOG_SECTOR) /* no more comes into sight */
            log->sectors[i].initial = value;
    }
    image_put(d, BASE, bytes, len);
    free(bytes);
}

static void run_begin(struct run *r, const struct plan *p)
{
    struct sim_file_setup well = {.type = FILE_TYPE_REGULAR, .size = WRITERS_MAX * WELL_ROOM};

    *r = (struct run){.plan = p, .disk = sim_disk_new(), .sectors = p->shape.size / LOG_SECTOR};
    if (p->resizes)
        r->sectors *= 2; /* L1 grows, too */
    r->size_now = p->shape.size;
    r->sizes[r->size_count++] = r->size_now;
    log_init(&r->log, r->sectors);
    if (p->encrypted)
        crypt_put_qcow2(r->disk, TOP, "a", p->shape.version, p->shape.cluster_bits,
                        p->shape.extended, p->shape.size);
    else
        image_make(r->disk, TOP, &p->shape);
    sim_disk_make(r->disk, WELL, &well);
    if (p->has_base)
        make_base(r->disk, p, &r->log);
}

static void run_end(struct run *r)
{
    for (unsigned i = 0; i < r->kept_count; i++)
        free(r->kept[i].data);
    log_release(&r->log);
    r->disk = sim_disk_free(r->disk);
}

static enum sim_end run_until(struct run *r, uint64_t kill_at_op)
{
    return run_killed_at(r->disk, r->plan->seed, run_plan, r, kill_at_op);
}

static void judge_crash(struct run *r, uint64_t cut_seed)
{
    /* What an operation on snapshots leaves when it is cut off (SNAP-2). */
    enum leaks allowed = r->plan->keeps ? LEAKS_AND_COPIES_ALLOWED : LEAKS_ALLOWED;
    struct qcow2_verdict v;

    if (cut_seed) {
        sim_disk_power_cut(r->disk, cut_seed);
        counts->cuts++;
    } else {
        /* The page cache lives, and what the process had not written yet is lost. */
        counts->kills++;
    }
    image_judge(r->disk, TOP, allowed, &v);
    counts->leaking += v.leaks > 0;
    counts->compressed += v.compressed_clusters > 0;
    check(run_on(r->disk, r->plan->seed + 2, look_at_all_kept, r) == SIM_RETURNED);
    check(run_on(r->disk, r->plan->seed + 1, look_and_write_on, r) == SIM_RETURNED);
    check(run_on(r->disk, r->plan->seed + 3, look_at_all_kept, r) == SIM_RETURNED);
    image_judge(r->disk, TOP, allowed, &v);
}

static void crash_at(const struct plan *p, uint64_t op, uint64_t cut_seed)
{
    static struct run r;

    if (getenv("CAIRN_CRASH_TRACE"))
        fprintf(stderr, "# seed %" PRIu64 ": kill at operation %" PRIu64 ", cut %" PRIu64 "\n",
                p->seed, op, cut_seed);
    run_begin(&r, p);
    if (run_until(&r, op) == SIM_KILLED)
        judge_crash(&r, cut_seed);
    run_end(&r);
}

/* Beside flushes, and elsewhere. */
static void crash_often(void *arg)
{
    const struct plan *p = arg;
    static struct run whole;
    struct prng prng = {p->seed + 9};
    struct qcow2_verdict v;
    uint64_t ops, bounds[BOUNDS_MAX];
    unsigned bound_count;

    run_begin(&whole, p);
    check(run_until(&whole, 0) == SIM_RETURNED);
    image_judge(whole.disk, TOP, NO_LEAKS, &v);
    ops = sim_disk_ops(whole.disk);
    bound_count = whole.bound_count;
    memcpy(bounds, whole.bounds, sizeof(bounds));
    run_end(&whole);
    for (unsigned i = 0; i < bound_count; i++) {
        /* The first ones are those of opening, and of the first growth. */
        if (i >= 6 && bound_count > p->bounds && prng_below(&prng, bound_count) >= p->bounds)
            continue;
        crash_at(p, bounds[i], 1 + prng_next(&prng) % 1000000);
        counts->boundaries++;
    }
    for (unsigned i = 0; i < RANDOM_CUTS; i++)
        crash_at(p, 1 + prng_below(&prng, ops), i == 4 ? 0 : 1 + prng_next(&prng) % 1000000);
}

static void print_counts(void)
{
    printf("# %" PRIu64 " power cuts, %" PRIu64 " of them beside a flush, and %" PRIu64
           " kills without one; %" PRIu64 " left leaks, %" PRIu64 " compressed clusters, %" PRIu64
           " sectors lost a late value, %" PRIu64 " snapshots, %" PRIu64 " copies by the host\n",
           counts->cuts, counts->boundaries, counts->kills, counts->leaking, counts->compressed,
           counts->lost, counts->kept, counts->copied);
}

static void plan_random(struct plan *p, uint64_t seed)
{
    struct prng prng = {seed};

    *p = (struct plan){.seed = seed, .ops = 8, .bounds = 60};
    qcow2_shape_random(&p->shape, &prng, 256 << 10);
    p->shape.zstd = p->shape.version == 3 && prng_chance(&prng, 300);
    p->shape.size = (uint64_t)(64 + prng_below(&prng, 192))
                    << (p->shape.cluster_bits > 12 ? 12 : 10);
    p->writers = 1 + (unsigned)prng_below(&prng, WRITERS_MAX);
    if (prng_chance(&prng, 300))
        p->shape.allocated = p->shape.size >> p->shape.cluster_bits >> 1;
    p->has_base = prng_chance(&prng, 500);
    if (p->has_base) {
        qcow2_shape_random(&p->base, &prng, p->shape.size);
        if (prng_chance(&prng, 300))
            p->base.size = (1 + prng_below(&prng, p->shape.size * 3 / 2 / 512)) * 512;
        p->base.allocated = p->base.size >> p->base.cluster_bits;
        p->shape.backing = BASE;
        p->shape.allocated = 0;
    }
    qcow2_shape_data_file(&p->shape, &prng, DATA, 250);
}

static void test_qcow2_crash__writes_zeroes_discards(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct plan p;

        plan_random(&p, seed);
        in_child(crash_often, &p);
    }
    print_counts();
    assert_true(!seeds_enough(50) || (counts->leaking > 0 && counts->lost > 0 &&
                                      counts->compressed > 0 && counts->copied > 100));
}

static void test_qcow2_crash__while_the_size_changes(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct plan p;

        plan_random(&p, seed);
        p.resizes = true;
        p.ops = 4;
        p.bounds = 16;
        if (seed % 3 && !p.shape.extended)
            p.shape.cluster_bits = 9; /* L1 grows only there */
        in_child(crash_often, &p);
    }
    print_counts();
}

/* With an image that can have them. */
static void plan_kept(struct plan *p, uint64_t seed)
{
    plan_random(p, seed);
    p->keeps = true;
    p->shape.data_file = NULL;
    p->ops = 5;
    p->bounds = 20;
}

/* Writers race for clusters that snapshots hold; the disk changes its size between them. */
static void test_qcow2_crash__with_snapshots(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct plan p;

        plan_kept(&p, seed);
        p.resizes = seed % 2;
        in_child(crash_often, &p);
    }
    print_counts();
    assert_true(!seeds_enough(20) || counts->kept > 0);
}

static void test_qcow2_crash__encrypted(void **state)
{
    (void)state;
    (void)crypt_header("a"); /* once for all children */
    TEST_SEEDS (seed) {
        struct plan p;

        if (seeds_enough(20) && seed % 8 != 1)
            continue; /* it takes long */
        plan_kept(&p, seed);
        p.encrypted = true;
        p.bounds = 12;
        p.keeps = seed % 3;
        p.resizes = seed % 2;
        p.shape.backing = NULL; /* none that the image names */
        p.shape.allocated = 0;
        p.shape.refcount_order = 4;
        in_child(crash_often, &p);
    }
    print_counts();
}

/* The file needs a larger refcount table after a few clusters: entries of 64 bits, blocks of 64 of them, 64 blocks. */
static void test_qcow2_crash__while_the_refcount_table_grows(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {seed};
        struct plan p = {
            .seed = seed,
            .ops = 14,
            .bounds = 5,
            .writers = 1 + (unsigned)prng_below(&prng, WRITERS_MAX),
            .shape = {.version = 3, .cluster_bits = 9, .refcount_order = 6, .size = 4300 * 512},
        };

        p.shape.allocated = 3940 + prng_below(&prng, 40); /* the table covers 4096 clusters */
        p.span = (unsigned)p.shape.allocated;
        in_child(crash_often, &p);
    }
    print_counts();
}
