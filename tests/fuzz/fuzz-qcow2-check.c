/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hostile images (P6), to check and repair under sim: nothing may crash, hang or take memory without bound. Whatever a repair calls
 * sound, the next check must call sound, too.
 *
 * Byte 3 of an input: 1: leaks alone are repaired.
 */
#include "base/macros.h"
#include "formats/list.h"
#include "formats/qcow2/check/qcow2-check.h"
#include "fuzz-qcow2-image.h"
#include "graph/backend.h"
#include "graph/graph.h"
#include "protocols/list.h"
#include "schema-types.h"

#define MEMORY_MAX ((uint64_t)8 << 20)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct input {
    uint8_t what;
    struct graph *graph;
};

static int co_fn control_fn add_file(struct input *in, struct error **err)
{
    struct node_options file = {.driver = NODE_DRIVER_FILE,
                                .node_name = (char *)(uintptr_t) "file"};

    file.u.file.filename = (char *)(uintptr_t)FUZZ_IMAGE;
    return graph_co_add(in->graph, &file, err);
}

static int co_fn check_as(struct backend *b, enum qcow2_repair repair,
                          struct qcow2_check_result *ret)
{
    AUTO(error_free) struct error *err = NULL;
    struct qcow2_check_options o = {.repair = repair, .memory_max = MEMORY_MAX};

    return qcow2_co_check(b, &o, ret, &err);
}

static void co_fn control_fn run_input(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct input *in = arg;
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE | ACCESS_RESIZE,
                            .tolerates = ACCESS_ALL};
    struct qcow2_check_result found, repaired, again;
    struct backend *b = NULL;

    in->graph = graph_new(drivers);
    if (add_file(in, &err) < 0 || backend_co_new(&b, in->graph, "file", access, "f", &err) < 0 ||
        backend_attach(b) < 0)
        abort();
    if (check_as(b, QCOW2_REPAIR_NOTHING, &found) == 0 &&
        check_as(b, in->what & 1 ? QCOW2_REPAIR_LEAKS : QCOW2_REPAIR_ALL, &repaired) == 0) {
        if (check_as(b, QCOW2_REPAIR_NOTHING, &again) < 0 ||
            again.corruptions != repaired.corruptions || again.leaks != repaired.leaks)
            abort();
        if (repaired.corruptions > found.corruptions && !found.corruptions)
            abort();
    }
    b = backend_co_free(b);
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
    in = (struct input){.what = data[3]};
    fuzz_run(disk, run_input, &in);
    return 0;
}
