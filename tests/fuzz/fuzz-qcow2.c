/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hostile images (P6), to the whole driver under sim: open, reads, writes, zeroes, discards, flush, resize, snapshots,
 * bitmaps, amend, a check beside them, close. Nothing may crash, hang or take memory without bound; errors are welcome.
 *
 * Byte 3 of an input: 1: read-only; 2, 4, 8: a snapshot is made, one is applied, one is deleted; 16: the image is emptied;
 * 32: the snapshot is shown, read-only; 64: bitmaps are added, merged, removed; 128: the image is checked while it is used.
 * Byte 7: 1: overlap-check=all; 2: it becomes one of version 3; 4: refcounts get another width; 8: to version 2, to lazy refcounts;
 * 16: another key slot comes into use.
 */
#include "base/macros.h"
#include "bitmaps/dirty-bitmap.h"
#include "formats/list.h"
#include "formats/qcow2/check/qcow2-check.h"
#include "formats/qcow2/qcow2-amend.h"
#include "formats/qcow2/qcow2-crypt.h"
#include "formats/qcow2/qcow2-snapshot.h"
#include "fuzz-qcow2-image.h"
#include "graph/backend.h"
#include "graph/graph.h"
#include "loop/scope.h"
#include "protocols/list.h"
#include "schema-types.h"

#define CHUNK      65536
#define MEMORY_MAX ((uint64_t)8 << 20)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct input {
    uint8_t what;
    uint8_t how;
    uint8_t width;
    bool encrypted;
    struct graph *graph;
    struct backend *backend;
    uint8_t data[CHUNK];
};

static bool is_read_only(const struct input *in)
{
    return in->what & (1 | 32);
}

static void co_fn send_some(struct input *in, enum request_kind kind, unsigned flags,
                            uint64_t offset, uint64_t len)
{
    bool carries = kind == REQUEST_READ || kind == REQUEST_WRITE;
    uint64_t size = backend_size(in->backend);
    struct iovec iov = {in->data, 0};
    struct request req = {.kind = kind, .flags = flags, .offset = offset};

    if (offset >= size)
        return;
    req.len = iov.iov_len = MIN(len, size - offset);
    req.iov = &iov;
    req.iov_count = carries;
    (void)backend_co_request(in->backend, &req);
}

static void co_fn describe(struct input *in, uint64_t offset)
{
    struct extent v[8];
    struct extents e = {.v = v, .max = ARRAY_SIZE(v)};
    struct request req = {.kind = REQUEST_EXTENTS, .offset = offset, .extents = &e};
    uint64_t size = backend_size(in->backend);

    if (offset >= size)
        return;
    req.len = MIN(size - offset, FUZZ_SIZE);
    (void)backend_co_request(in->backend, &req);
}

static void co_fn use(struct input *in)
{
    uint64_t size = backend_size(in->backend);

    for (uint64_t at = 0; at < size && at < FUZZ_SIZE; at += CHUNK) {
        send_some(in, REQUEST_READ, 0, at, CHUNK);
        describe(in, at);
    }
    send_some(in, REQUEST_READ, 0, size - MIN(size, (uint64_t)1000), 1000);
    if (is_read_only(in))
        return;
    send_some(in, REQUEST_WRITE, 0, 0, 700);
    send_some(in, REQUEST_WRITE, REQUEST_FUA, 5000, 9000);
    send_some(in, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, 16384, 20000);
    send_some(in, REQUEST_DISCARD, 0, 40000, 70000);
    send_some(in, REQUEST_WRITE, 0, 60000, CHUNK);
    send_some(in, REQUEST_FLUSH, 0, 0, 0);
    send_some(in, REQUEST_WRITE, 0, 40000, 30000);
    send_some(in, REQUEST_WRITE, REQUEST_COMPRESSED, 131072, CHUNK);
    send_some(in, REQUEST_WRITE, 0, size - MIN(size, (uint64_t)1000), 1000);
    send_some(in, REQUEST_READ, 0, 30000, CHUNK);
}

static void co_fn control_fn check_beside(void *arg)
{
    static const struct access access = {ACCESS_READ, ACCESS_ALL};
    AUTO(error_free) struct error *err = NULL;
    struct qcow2_check_options o = {.memory_max = MEMORY_MAX};
    struct qcow2_check_result found;
    struct input *in = arg;
    struct backend *b;

    if (backend_co_new(&b, in->graph, "top", access, "checker", &err) < 0)
        abort();
    if (backend_attach(b) < 0)
        abort();
    (void)qcow2_co_check_online(b, &o, &found, &err);
    (void)backend_co_free(b);
}

static void co_fn use_checked(struct input *in)
{
    struct co_scope checking;

    if (!(in->what & 128)) {
        use(in);
        return;
    }
    co_scope_init(&checking);
    if (co_scope_start(&checking, check_beside, in) < 0)
        abort();
    use(in);
    co_scope_join(&checking);
}

static void co_fn control_fn resize(struct input *in, uint64_t size)
{
    AUTO(error_free) struct error *err = NULL;

    (void)graph_co_resize(in->graph, "top", size, &err);
}

/* One after the other, each whatever became of the ones before. */
static void co_fn control_fn change_bitmaps(struct input *in)
{
    static const struct dirty_bitmap_ref stored = {"top", "b"}, fresh = {"top", "n"};

    enum { ADD, MERGE, CLEAR, ENABLE, REMOVE, STEPS };

    for (int step = ADD; step < STEPS; step++) {
        AUTO(error_free) struct error *err = NULL;
        struct dirty_bitmap_action a;
        struct change change;
        int r = 0;

        change_init(&change, in->graph, "bitmap");
        switch (step) {
        case ADD:
            r = dirty_bitmap_action_add(&change, &a, fresh, 512, true, &err);
            a.persistent = true;
            break;
        case MERGE:
            r = dirty_bitmap_action_merge(&change, &a, fresh, &stored, 1, &err);
            break;
        case CLEAR:
            r = dirty_bitmap_action_clear(&change, &a, stored, &err);
            break;
        case ENABLE:
            r = dirty_bitmap_action_enable(&change, &a, stored, false, &err);
            break;
        case REMOVE:
            r = dirty_bitmap_action_remove(&change, &a, stored, &err);
            break;
        }
        if (r == 0)
            (void)change_co_run(&change, &err);
        change_end(&change);
        if (step == MERGE)
            use(in);
    }
}

static int co_fn amend(struct input *in, struct error **err)
{
    struct qcow2_amendment a = {.change_lazy = true, .lazy_refcounts = in->how & 8};

    if (in->how & 2)
        a.version = in->how & 8 ? 2 : 3;
    if (in->how & 4)
        a.refcount_bits = 1u << (in->width / 7 % 7);
    return qcow2_co_amend(in->backend, &a, err);
}

static void co_fn control_fn change_slots(struct input *in)
{
    AUTO(error_free) struct error *err = NULL;
    struct secret fresh = secret_of("fresh");
    struct luks_amend a = {
        .activate = true, .new_secret = &fresh, .has_iter_ms = true, .iter_ms = 1};

    (void)qcow2_co_amend_keys(in->backend, &a, &err);
}

/* After a failure the image may have to be opened anew. */
static void co_fn control_fn change_image(struct input *in)
{
    static const struct qcow2_snapshot_new fresh = {.name = "new"};
    AUTO(error_free) struct error *err = NULL;
    bool has_state;
    int r = 0;

    if (in->what & 2)
        r = qcow2_co_snapshot_create(in->backend, &fresh, &err);
    if (r == 0 && in->what & 2)
        use(in);
    if (r == 0 && in->what & 4)
        r = qcow2_co_snapshot_apply(in->backend, "1", &has_state, &err);
    if (r == 0 && in->what & 8)
        r = qcow2_co_snapshot_delete(in->backend, "s", &err);
    if (r == 0 && in->what & 16)
        r = qcow2_co_empty(in->backend, &err);
    if (r == 0 && in->how & (2 | 4))
        r = amend(in, &err);
    if (r == 0 && (in->what & 30 || in->how & (2 | 4)))
        use(in);
}

static int co_fn control_fn add_disk(struct input *in, struct error **err)
{
    struct node_options file = {.driver = NODE_DRIVER_FILE};
    struct node_ref below = {.kind = NODE_REF_DEFINITION};
    struct node_ref_or_null none = {.kind = NODE_REF_OR_NULL_NULL};
    struct qcow2_snapshot_ref snapshot = {.kind = QCOW2_SNAPSHOT_REF_ANY};
    struct qcow2_overlap_checks checks = {.kind = QCOW2_OVERLAP_CHECKS_MODE,
                                          .mode = QCOW2_OVERLAP_CHECK_MODE_ALL};
    struct qcow2_encryption encryption = {.key_secret = (char *)(uintptr_t)FUZZ_SECRET};
    struct node_options disk = {
        .driver = NODE_DRIVER_QCOW2,
        .node_name = (char *)(uintptr_t) "top",
        .has_read_only = true,
        .read_only = is_read_only(in),
        .has_discard = true,
        .discard = DISCARD_MODE_UNMAP,
    };

    file.u.file.filename = (char *)(uintptr_t)FUZZ_IMAGE;
    below.definition = &file;
    disk.u.qcow2.file = below;
    disk.u.qcow2.backing = &none;
    snapshot.any = (char *)(uintptr_t) "1";
    if (in->what & 32)
        disk.u.qcow2.snapshot = &snapshot;
    if (in->encrypted)
        disk.u.qcow2.encrypt = &encryption;
    if (in->how & 1)
        disk.u.qcow2.overlap_check = &checks;
    disk.u.qcow2.l2_cache_size = 1 << 20;
    return graph_co_add(in->graph, &disk, err);
}

static void co_fn control_fn run_input(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct input *in = arg;
    struct access access = {.wants = ACCESS_READ | (is_read_only(in) ? 0 : ACCESS_WRITE),
                            .tolerates = ACCESS_ALL};

    in->graph = graph_new(drivers);
    fuzz_luks_add_secret(in->graph);
    if (add_disk(in, &err) == 0 &&
        backend_co_new(&in->backend, in->graph, "top", access, "fuzzer", &err) == 0) {
        if (backend_attach(in->backend) < 0)
            abort();
        use_checked(in);
        if (!is_read_only(in)) {
            if (in->what & 64)
                change_bitmaps(in);
            if (in->how & 16)
                change_slots(in);
            resize(in, FUZZ_SIZE / 2);
            resize(in, FUZZ_SIZE * 2);
            send_some(in, REQUEST_WRITE, 0, FUZZ_SIZE + 5000, 9000);
            change_image(in);
        }
        in->backend = backend_co_free(in->backend);
    }
    in->graph = graph_co_free(in->graph);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct input in;
    struct sim_disk *disk = sim_disk_new();

    if (!fuzz_make_image(disk, data, size)) {
        sim_disk_free(disk);
        return 0;
    }
    in = (struct input){
        .what = data[3], .how = data[7], .width = data[1], .encrypted = data[4] & FUZZ_LUKS};
    fuzz_run(disk, run_input, &in);
    return 0;
}
