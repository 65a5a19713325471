/* SPDX-License-Identifier: Apache-2.0 */
/* One backup, by the protocol of docs/backup.md, whose steps have their numbers in the code. */
#ifndef CAIRN_CLI_BACKUP_RUN_H
#define CAIRN_CLI_BACKUP_RUN_H

#include "base/error.h"
#include "cairn/client.h"
#include "cli/catalogue.h"
#include "cli/progress.h"

#include <stdbool.h>
#include <stdint.h>

struct backup_run_options {
    const char *node; /* NULL: the one that is exported */
    bool full;        /* whatever the bitmap says */
    uint64_t speed;   /* bytes/s; 0: no limit */
    bool json;        /* no bar */
};

/*
 * *ret_point is the new point, borrowed from the catalogue. 0 also when the point is there and the daemon has failed afterwards; that
 * is told by a warning. After an error there is no new point, and of what was begun is undone what can be.
 */
int backup_run(struct cairn_client *client, struct catalogue *c, const struct backup_run_options *o,
               const struct point **ret_point, struct error **err);

#endif
