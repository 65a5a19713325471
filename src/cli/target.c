/* SPDX-License-Identifier: Apache-2.0 */
/* The engine makes images in a coroutine: here is a loop for it. */
#include "cli/target.h"
#include "formats/qcow2/qcow2-create.h"
#include "loop/loop.h"

struct creation {
    const char *path;
    struct qcow2_create_options options;
    int result;
    struct error *error;
};

static void co_fn create(void *arg)
{
    struct creation *c = arg;

    c->result = qcow2_co_create(c->path, &c->options, &c->error);
}

int target_create(const char *path, uint64_t size, const char *backing, struct error **err)
{
    struct creation c = {.path = path, .options = QCOW2_CREATE_OPTIONS_INIT};
    int r;

    c.options.size = size;
    c.options.backing_file = backing;
    c.options.backing_format = backing ? "qcow2" : NULL;
    r = loop_run_main(LOOP_ENGINE_AUTO, "create", create, &c, err);
    if (r < 0)
        return r;
    if (c.error)
        error_move(err, &c.error);
    return c.result;
}
