/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What happens when damage is found. Where a request merely cannot be done (a mapping that points nowhere), it fails, the others
 * go on, and it is told once. Where a write would have made it worse, the image is corrupt:
 *
 * CORRUPT-1 From the moment on when it is found no request succeeds, and nothing is written to the file but the mark.
 * CORRUPT-2 The mark is durable before the request that found it fails; if it cannot be written then, closing tries again.
 * CORRUPT-3 It is told once, and mere damage is not told after it.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/endian.h"
#include "base/log.h"
#include "formats/qcow2/qcow2.h"
#include "graph/damage.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

int qcow2_damaged(struct qcow2 *q, const char *fmt, ...)
{
    struct node_damage damage = {.fatal = false};
    va_list args;
    char *what;

    if (atomic_swap(&q->broken_told, true))
        return -EIO;
    va_start(args, fmt);
    what = xvasprintf(fmt, args);
    va_end(args);
    log_warning("node '%s': the image is damaged: %s; check it with cairn check",
                node_name(q->node), what);
    damage.what = what;
    node_tell_damage(q->node, &damage);
    free(what);
    return -EIO;
}

/* Version 2 has no place for the mark. Other bits may have changed since the image was opened. */
static int co_fn write_mark(struct qcow2 *q, const struct request *by)
{
    struct iobuf *b = iobuf_new(8);
    int r = b ? qcow2_read_meta(q, by, QCOW2_OFFSET_INCOMPATIBLE, b, 0, 8) : -ENOMEM;

    if (r == 0) {
        store_be64(b->data, load_be64(b->data) | QCOW2_INCOMPATIBLE_CORRUPT);
        r = qcow2_write_mark(q, by, b);
    }
    if (r == 0)
        r = qcow2_sync(q, by);
    iobuf_unref(b);
    return r;
}

void qcow2_mark_if_corrupt(struct qcow2 *q, const struct request *by)
{
    int r;

    if (!atomic_get(&q->corrupt) || q->version < 3 || atomic_swap(&q->marked, true))
        return;
    r = write_mark(q, by);
    if (r < 0) {
        atomic_set(&q->marked, false);
        log_warning("node '%s': cannot mark the image as corrupt: %s, retrying when it is closed",
                    node_name(q->node), strerror(-r));
    }
}

int qcow2_corrupt(struct qcow2 *q, const struct request *by, uint64_t offset, uint64_t bytes,
                  const char *fmt, ...)
{
    struct node_damage damage = {.has_place = true, .offset = offset, .size = bytes, .fatal = true};
    va_list args;
    char *what;

    if (atomic_swap(&q->corrupt, true)) /* CORRUPT-3 */
        return -EIO;
    atomic_set(&q->broken_told, true);
    va_start(args, fmt);
    what = xvasprintf(fmt, args);
    va_end(args);
    log_warning("node '%s': the image is corrupt, at %" PRIu64 " of its file: %s; the node takes "
                "no more requests: close it and repair the image with cairn check -r all",
                node_name(q->node), offset, what);
    damage.what = what;
    node_tell_damage(q->node, &damage);
    free(what);
    qcow2_mark_if_corrupt(q, by);
    return -EIO;
}
