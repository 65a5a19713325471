/* SPDX-License-Identifier: Apache-2.0 */
/* Asks for the extents of the whole disk. Where that fails, each unit of allocation is asked for by itself, and counted. */
#include "cli/image/check-imported.h"
#include "base/checked.h"
#include "base/macros.h"
#include "cli/cli.h"

#include <errno.h>
#include <string.h>

/* Asked for at once. */
#define STEP ((uint64_t)1 << 30)

bool check_imported_is_for(const char *format)
{
    return strcmp(format, "vdi") == 0 || strcmp(format, "vhdx") == 0 || strcmp(format, "vmdk") == 0;
}

/* How far from `offset` on nothing is wrong, to `end` at most. */
static int co_fn ask(struct backend *b, uint64_t offset, uint64_t end, uint64_t *ret_end)
{
    struct extent v[64];
    struct extents e = {.v = v, .max = ARRAY_SIZE(v)};
    struct request req = {
        .kind = REQUEST_EXTENTS, .offset = offset, .len = end - offset, .extents = &e};
    int r = backend_co_request(b, &req);

    *ret_end = r == 0 ? extents_end(&e, offset) : offset;
    return r;
}

static int co_fn walk(struct backend *b, uint64_t unit, uint64_t *ret_damaged, struct error **err)
{
    uint64_t size = backend_size(b);
    uint64_t careful = 0; /* up to here unit by unit */
    uint64_t at = 0;

    while (at < size) {
        bool one = at < careful;
        uint64_t end = MIN(size, one ? align_down(at, unit) + unit : at + STEP);
        uint64_t next;
        int r = ask(b, at, end, &next);

        if (r < 0 && r != -EIO)
            return error_set(err, -r, "cannot read the image: %s", strerror(-r));
        if (r < 0 && one)
            ++*ret_damaged;
        if (r < 0 && !one)
            careful = end;
        if (r < 0)
            next = one ? end : at;
        at = next;
        if (cli_interrupted())
            return cli_interrupted_error(err);
    }
    return 0;
}

int check_imported_co(const struct image *image, uint64_t *ret_damaged, struct error **err)
{
    const struct image_layer *top = &image->layers[0];
    struct backend *b = NULL;
    int r =
        image_co_backend(&b, image->graph, top->node,
                         (struct access){ACCESS_READ, ACCESS_READ | ACCESS_WRITE_UNCHANGED}, err);

    if (r == 0)
        r = walk(b, MAX(top->imported_cluster, (uint64_t)512), ret_damaged, err);
    (void)backend_co_free(b);
    return r;
}
